"""The diffusion transformer: blocks, attention, embedders of the conditions."""
