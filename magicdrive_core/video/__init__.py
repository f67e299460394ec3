"""Files and images of video: H.264 under a cap, PNG frames, records of generated clips, drawings and contact sheets."""
