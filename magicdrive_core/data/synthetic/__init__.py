"""A small world, written and drawn as a nuScenes data root."""
