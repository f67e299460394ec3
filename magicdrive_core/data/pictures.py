"""Camera pictures as video frames: resized by PIL's bicubic filter, then cropped at the top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.config.schema import parse_size
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry.cameras import VIEWS, Framing, full_window

Pixels = NDArray[np.uint8]


def read_picture(path: Path, framing: Framing, *, scaled: bool = False) -> Pixels:
    """One picture as a frame of a video: (H, W, 3) RGB.

    Of a picture of another size than 1600x900, the part that ``full_window`` names; whether it has the size that its
    record says is checked when the infos are made.

    Args:
        path: of the picture.
        framing: of the video.
        scaled: decode JPEG at 1/2, 1/4 or 1/8, at least twice as large as needed, before the bicubic filter. Several
            times as fast, and 50 dB or more from decoding it whole (docs/log.md).

    Raises:
        UsageError: the video has more rows than the picture has at its width.
        MagicDriveError: missing, truncated or no picture at all.
    """
    if framing.crop < 0:
        raise UsageError(
            f"size {framing.height}x{framing.width}: a picture has {framing.resized_height} rows at that width",
            "choose a size of 16:9 or flatter in params.yaml",
        )
    try:
        with Image.open(path) as picture:
            size = framing.width, framing.resized_height
            if scaled:
                picture.draft("RGB", (2 * size[0], 2 * size[1]))
            window = full_window(*picture.size)
            resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=window)
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "complete the data set and run `dvc repro infos`") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise MagicDriveError(f"{path} is not a whole picture: {error}", "fetch or draw the file again") from None
    return np.asarray(resized)[framing.crop :]


def read_clip(
    root: Path | str,
    scene: Scene,
    clip: Clip,
    size: str,
    *,
    scaled: bool = False,
    views: Sequence[int] = range(len(VIEWS)),
) -> Pixels:
    """The pictures of a clip at a size such as "224x400": (V, F, H, W, 3) RGB; ``scaled`` as in ``read_picture``."""
    framing = Framing(*parse_size(size))
    frames = scene.pictures[clip.start : clip.start + clip.frames]
    out = np.empty((len(views), len(frames), framing.height, framing.width, 3), np.uint8)
    for index, paths in enumerate(frames):
        for place, view in enumerate(views):
            out[place, index] = read_picture(Path(root) / paths[view], framing, scaled=scaled)
    return out
