"""What an experiment consists of: training stages with their fingerprints, and where results lie. No torch."""
