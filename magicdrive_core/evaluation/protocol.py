"""The W-CODA 2024 protocol: which part of a picture is scored, the formula of the score, and published results.

Videos of 848 rows carry 52 black rows on top, 13 after the reduction by four. The evaluator's crop of 224 rows keeps 12
of them, and the same videos then score 167 instead of 94; the authors of the baseline later kept 212 rows. Each crop
has its own name here, and figures of different crops are never compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.video.colour import Picture

FRAMES = 16
KEY_FRAMES = (0, 6, 12)  # frames that the evaluator's detector sees
REDUCED = (225, 400)  # H, W: a quarter of 900x1600
SIDE = 224  # pixels along each side of the extractor's input
CROPS = {"fvd_224": 224, "fvd_212": 212}  # rows kept at the bottom, by the name of the figure


def reduced(picture: Picture) -> Picture:
    """Resize a picture to a quarter with PIL's bicubic filter.

    Args:
        picture: uint8 RGB picture, (900, 1600, 3) in the protocol.

    Returns:
        uint8 RGB picture (225, 400, 3).
    """
    return np.asarray(Image.fromarray(picture).resize(REDUCED[::-1], Image.Resampling.BICUBIC))


def framed(clip: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    """Crop and resize a clip to the extractor's input.

    The steps: keep the lowest ``rows`` rows; scale the short side to 224 pixels by bilinear interpolation, the long one
    rounded up; cut out the central 224x224; map colours from [0, 255] to [-1, 1].

    Args:
        clip: RGB frames (F, 225, 400, 3).
        rows: Rows that are kept, counted from the bottom.

    Returns:
        (3, F, 224, 224), float32.
    """
    height, width = rows, clip.shape[2]
    scale = SIDE / min(height, width)
    size = max(SIDE, math.ceil(width * scale)), max(SIDE, math.ceil(height * scale))
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    out = np.empty((3, len(clip), SIDE, SIDE), np.float32)
    for n, frame in enumerate(clip):
        kept = frame[len(frame) - rows :].astype(np.float32)
        if size != (width, height):
            kept = cv2.resize(kept, size, interpolation=cv2.INTER_LINEAR)
        out[:, n] = kept[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1)
    return out / 127.5 - 1


@dataclass(frozen=True)
class Published:
    """One line of the track's public results."""

    team: str
    fvd: float
    crop: str  # of CROPS
    mean_ap: float  # percent
    mean_iou: float  # percent
    score: float | None  # as published


RESULTS = (
    Published("LiAuto-AD (1st)", 94.60, "fvd_224", 24.55, 35.96, 2.5962),
    Published("DreamForge (2nd)", 224.76, "fvd_224", 13.80, 29.05, 0.7168),
    Published("Seven (3rd)", 232.51, "fvd_224", 12.78, 19.46, 0.0730),
    Published("seed0", 210.40, "fvd_224", 12.05, 18.27, 0.0473),
    Published("MagicDrive, the baseline", 218.12, "fvd_224", 11.8617, 18.3429, 0.0),
    Published("MagicDrive-V2, 4 devices a clip", 94.19, "fvd_212", 18.17, 20.40, None),
    Published("MagicDrive-V2, 8 devices a clip", 91.86, "fvd_212", 18.17, 20.40, None),
)
BASELINE = next(result for result in RESULTS if result.score == 0.0)


def score(fvd: float, mean_ap: float, mean_iou: float) -> float:
    """Compute the track's score: (A - FVD) / A + (mAP - B) / B + (mIoU - C) / C.

    A, B and C are the baseline's FVD, mAP and mIoU: 218.12, 11.8617 and 18.3429.

    Args:
        fvd: FVD with the evaluator's crop (``fvd_224``).
        mean_ap: mAP in percent.
        mean_iou: mIoU in percent.

    Returns:
        The score; the baseline's is 0, and higher is better.
    """
    a, b, c = BASELINE.fvd, BASELINE.mean_ap, BASELINE.mean_iou
    return (a - fvd) / a + (mean_ap - b) / b + (mean_iou - c) / c
