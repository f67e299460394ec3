"""MagicDrive-V2: data, network, training, generation and benchmark."""

import logging

# colossalai, diffusers and transformers import it in any process, and it complains about every CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
