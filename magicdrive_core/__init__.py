"""MagicDrive-V2: data, network, training, generation and the W-CODA submission."""

import logging

# colossalai, diffusers and transformers import bitsandbytes in any process; it logs a warning on every CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
