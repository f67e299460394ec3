"""Training: the loop, the engine (ColossalAI's ZeRO-2), sharded state and checkpoints, the loader, and records.

A step is in loop.py; supervise.py starts and restarts the ranks (worker.py) from outside.
"""
