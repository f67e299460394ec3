"""Generation of clips, one item at a time."""
