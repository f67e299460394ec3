"""Halos of lamps: light that a lens spreads about bright points. Integer arithmetic only."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.synthetic.lens import SHIFT, Pixels
from magicdrive_core.data.synthetic.light import COARSE, Picture
from magicdrive_core.data.synthetic.objects import Colour
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH

REACH = 700.0  # pixels of a halo's radius at one metre
SMALLEST, LARGEST = 3, 14  # cells


def add_halos(picture: Picture, lamps: list[tuple[Pixels, Colour, float]], strength: int) -> None:
    """Adds halos about the shining faces.

    Args:
        picture: changed in place.
        lamps: outline, colour and metres away of what shines.
        strength: of a halo's middle, in percent of the lamp's colour.
    """
    rows, columns = PICTURE_HEIGHT // COARSE + 1, PICTURE_WIDTH // COARSE
    cells = np.zeros((rows, columns, 3), np.int32)
    for outline, colour, away in lamps:
        low, high = outline.min(axis=0), outline.max(axis=0)
        x, y = ((low + high) // 2) >> SHIFT
        if not (0 <= x < PICTURE_WIDTH and 0 <= y < PICTURE_HEIGHT) or max(high - low) >> SHIFT > 120:
            continue  # shop windows close by are bright but are no lamps
        if tuple(picture[y, x]) != colour:
            continue  # something stands before it
        radius = int(np.clip(REACH / away / COARSE, SMALLEST, LARGEST))
        _stamp(cells, int(x) // COARSE, int(y) // COARSE, _halo(radius), np.array(colour) * strength // 100)
    bright = np.flatnonzero(cells.any(axis=(1, 2)))
    if not bright.size:
        return
    first, last = max(bright[0] - 1, 0), bright[-1] + 2
    halos = np.minimum(cells[first:last], 255).astype(np.uint8)
    fine = cv2.resize(halos, None, fx=COARSE, fy=COARSE, interpolation=cv2.INTER_LINEAR_EXACT)
    part = picture[first * COARSE : last * COARSE]
    cv2.add(part, fine[: len(part)], dst=part)


def _stamp(cells: NDArray[np.int32], x: int, y: int, halo: NDArray[np.int32], colour: NDArray[np.int64]) -> None:
    radius = len(halo) // 2
    left, top = max(x - radius, 0), max(y - radius, 0)
    right, bottom = min(x + radius + 1, cells.shape[1]), min(y + radius + 1, cells.shape[0])
    part = halo[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
    cells[top:bottom, left:right] += part[..., None] * colour.astype(np.int32) // 1024


@cache
def _halo(radius: int) -> NDArray[np.int32]:
    """A bright spot that fades out at ``radius`` cells: 0 to 1024."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    share = np.maximum(1024 - 1024 * (x * x + y * y) // (radius * radius), 0)
    return (share * share // 1024 * share // 1024).astype(np.int32)
