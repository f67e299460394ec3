"""A generated city that is written as a nuScenes data root: tables, maps, lidar and camera images."""
