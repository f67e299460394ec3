"""A golden sample: one generated clip in a lossless file, against which later generations are compared in dB.

Bytes would be too strict: processors round differently, and a sampler of many steps carries that on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.condition_swap import Video
from magicdrive_core.utils.files import atomic_file
from magicdrive_core.video.frames import read_frame

PEAK = 255.0


def write_golden(video: Video, path: Path) -> None:
    """Write a clip as one PNG: a row for each view, a column for each frame.

    Args:
        video: uint8 RGB frames (V, F, H, W, 3), such as ``ClipPainter.edited`` returns.
        path: The file.
    """
    with atomic_file(path) as partial:
        Image.fromarray(rearrange(video, "v f h w c -> (v h) (f w) c")).save(partial, format="PNG", optimize=True)


def golden_psnr(video: Video, path: Path) -> float:
    """Compare a clip with a golden sample.

    Args:
        video: uint8 RGB frames (V, F, H, W, 3).
        path: A file of ``write_golden``.

    Returns:
        Peak signal-to-noise ratio over all frames in dB; infinite for equal clips.

    Raises:
        MagicDriveError: The file is missing, not a PNG, or of a clip of another size.
    """
    if not path.is_file():
        raise MagicDriveError(f"{path} is missing", "write the golden sample first")
    golden = read_frame(path)
    sheet = rearrange(video, "v f h w c -> (v h) (f w) c")
    if golden.shape != sheet.shape:
        raise MagicDriveError(
            f"{path} is of another clip: shape {golden.shape}, not {sheet.shape}",
            "generate the clip with the settings of the golden sample",
        )
    error = np.square(golden.astype(np.float64) - sheet).mean()
    return float(10 * np.log10(PEAK**2 / error)) if error else float("inf")
