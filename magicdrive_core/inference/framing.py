"""From the network's frames back to pictures of 1600x900, as W-CODA and nuScenes have them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.video.colour import Picture


def full_picture(frame: Picture) -> Picture:
    """A frame (H, W, 3) as a picture (900, 1600, 3): resized to the full width, black rows on top.

    The rows are those that were cut off before training: 52 at 424x800 and 848x1600, 4 at 224x400.

    Raises:
        MagicDriveError: the frame is taller than the picture.
    """
    height = round(frame.shape[0] * PICTURE_WIDTH / frame.shape[1])
    if height > PICTURE_HEIGHT:
        raise MagicDriveError(
            f"frames of {frame.shape[0]}x{frame.shape[1]} are taller than {PICTURE_HEIGHT} rows at full width",
            "choose a generate.resolution of 16:9 or wider",
        )
    out = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH, 3), dtype=np.uint8)
    resized = Image.fromarray(frame).resize((PICTURE_WIDTH, height), Image.Resampling.BICUBIC)
    out[PICTURE_HEIGHT - height :] = np.asarray(resized)
    return out
