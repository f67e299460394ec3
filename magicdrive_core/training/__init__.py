"""Training: one readable loop, and what it stands on."""
