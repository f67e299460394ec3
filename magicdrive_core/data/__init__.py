"""From recordings (nuScenes, Argoverse 2) to the conditions of a clip. NumPy only."""
