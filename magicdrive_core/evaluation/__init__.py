"""How good generated videos are: Frechet distances, detection, BEV masks, control fidelity."""
