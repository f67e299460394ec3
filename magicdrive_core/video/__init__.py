"""H.264 encoding and decoding, frames, overlays and contact sheets."""
