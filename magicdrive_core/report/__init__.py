"""The report: one self-contained page on what was generated and from what."""
