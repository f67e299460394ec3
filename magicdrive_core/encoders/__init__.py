"""Video and text encoders, and caches of what they computed."""
