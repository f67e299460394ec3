"""Tools without knowledge of driving or diffusion: atomic files, memory limits, progress, process pools."""
