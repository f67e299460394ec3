"""Training: the loop, the engine (ColossalAI ZeRO-2), sharded state and checkpoints, the loader, statistics and records."""
