"""Video and text encoders: the CogVideoX VAE, T5, small ones for the demo, and caches of what they compute."""
