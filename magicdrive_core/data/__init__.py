"""From nuScenes tables to the conditions of a clip. NumPy only: nothing here imports torch."""
