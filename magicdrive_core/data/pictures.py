"""Camera pictures as video frames: resized by PIL's bicubic filter, then cropped at the top."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.config import parse_size
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS, Framing

Pixels = NDArray[np.uint8]


def read_picture(path: Path, framing: Framing) -> Pixels:
    """One picture as a frame of a video: (H, W, 3) RGB.

    Decoded whole: JPEG's scaled decoding is faster but gives other pixels than the bicubic filter.

    Raises:
        MagicDriveError: missing, truncated, no picture at all, or not 1600x900.
    """
    try:
        with Image.open(path) as picture:
            if picture.size != (PICTURE_WIDTH, PICTURE_HEIGHT):
                width, height = picture.size
                expected = f"{PICTURE_WIDTH}x{PICTURE_HEIGHT}"
                raise MagicDriveError(f"{path} is a picture of {width}x{height} pixels, not {expected}")
            resized = picture.convert("RGB").resize((framing.width, framing.resized_height), Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "complete the data set and run `dvc repro infos`") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise MagicDriveError(f"{path} is not a whole picture: {error}", "fetch or draw the file again") from None
    return np.asarray(resized)[framing.crop :]


def read_clip(root: Path | str, scene: Scene, clip: Clip, size: str) -> Pixels:
    """All pictures of a clip at a size such as "224x400": (V, F, H, W, 3) RGB."""
    framing = Framing(*parse_size(size))
    frames = scene.pictures[clip.start : clip.start + clip.frames]
    out = np.empty((len(VIEWS), len(frames), framing.height, framing.width, 3), np.uint8)
    for index, paths in enumerate(frames):
        for view, path in enumerate(paths):
            out[view, index] = read_picture(Path(root) / path, framing)
    return out
