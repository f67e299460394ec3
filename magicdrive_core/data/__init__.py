"""From recordings to conditions: data set adapters, 12 Hz scenes, BEV maps, clips and scene edits."""
