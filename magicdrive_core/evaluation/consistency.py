"""Consistency of videos in time and between cameras, judged by the exact correspondence of their pixels.

What a pixel shows is looked up in another picture: of the frame before, or of the neighbouring camera. Both should have
the same colour and the same structure. A grey video has no colour error, so that the structure counts beside it; and
reflections, shadows and the lamps of cars move over the surfaces, so that rendered videos have an error, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.synthetic.surfaces import Correspondence
from magicdrive_core.video.colour import Picture

PLAIN = 0.5  # grey levels: pictures whose brightness differs less from its surroundings have no structure


@dataclass(frozen=True)
class Agreement:
    """Agreement of pictures with others that show the same points.

    Attributes:
        error: Mean absolute difference of the colours, in grey levels of 255; NaN without any common pixel.
        structure: Correlation of the brightness, each less its mean in the surroundings: 1 for the same structure, 0
            for unrelated ones. NaN where either side is plain.
        pixels: Number of compared pixels.
    """

    error: float
    structure: float
    pixels: int


class AgreementTally:
    """Sums of agreement over pairs of pictures, one after the other."""

    def __init__(self) -> None:
        self._pixels, self._difference = 0, 0.0
        self._products = np.zeros(3)  # of the structures: one by the other, one by itself, the other by itself

    def add(self, picture: Picture, other: Picture, found: Correspondence) -> None:
        """Count a pair of pictures.

        Args:
            picture: RGB picture (H, W, 3).
            other: RGB picture (H, W, 3) that shows the same points at other pixels.
            found: Where ``other`` shows what the pixels of ``picture`` show.
        """
        if not found.valid.any():
            return
        at = found.at[..., 0], found.at[..., 1]
        warped: Picture = cv2.remap(np.ascontiguousarray(other), *at, cv2.INTER_LINEAR).astype(np.uint8, copy=False)
        difference = np.abs(picture[found.valid].astype(np.float64) - warped[found.valid])
        self._pixels += len(difference)
        self._difference += float(difference.mean(axis=1).sum())
        mine, theirs = (_structure(image, found.valid) for image in (picture, warped))
        self._products += mine @ theirs, mine @ mine, theirs @ theirs

    def figures(self) -> Agreement:
        """Compute the figures over all pairs together.

        Returns:
            The figures; NaN where nothing was counted.
        """
        if not self._pixels:
            return Agreement(float("nan"), float("nan"), 0)
        both, one, other = self._products / self._pixels
        structure = both / np.sqrt(one * other) if min(one, other) > PLAIN**2 else float("nan")
        return Agreement(self._difference / self._pixels, float(structure), self._pixels)


def _structure(picture: Picture, valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute the brightness of the N valid pixels less its mean over the valid ones around each: (N,)."""
    side = 2 * (picture.shape[1] // 40) + 1  # a twentieth of the width
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY).astype(np.float32)
    weight = valid.astype(np.float32)
    means = [cv2.blur(image, (side, side), borderType=cv2.BORDER_CONSTANT) for image in (grey * weight, weight)]
    return (grey[valid] - means[0][valid] / means[1][valid]).astype(np.float64)
