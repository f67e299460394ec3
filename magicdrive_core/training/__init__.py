"""Training: the loop, its engine (ColossalAI), state, loader and records."""
