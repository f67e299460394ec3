"""An experiment: its training stages with their fingerprints, and the folders of its results. No torch."""
