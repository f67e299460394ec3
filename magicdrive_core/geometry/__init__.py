"""Coordinate frames: poses, cameras and boxes."""
