"""Video and text encoders, and the caches of what they computed."""
