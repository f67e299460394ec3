"""How good generated videos are: Fréchet distances, detection, BEV masks, control fidelity."""
