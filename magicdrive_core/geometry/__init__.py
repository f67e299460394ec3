"""Poses, cameras and oriented boxes as NumPy arrays."""
