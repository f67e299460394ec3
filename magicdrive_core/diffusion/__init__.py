"""Rectified flow: noise levels, guidance, sampling, step cache, masks of conditioning frames. No network."""
