"""Clouds and the skyline: things so far away that only their direction counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.synthetic.ground import Label, Labels
from magicdrive_core.synthetic.lens import SHIFT, Lens

Array = NDArray[np.float64]

CLOUDS = 15
POINTS = 22  # of each outline
SKYLINE_STEP = 2  # degrees of a house
CHUNK = 20  # degrees of an outline: two points a house and two below make POINTS
FAR = 1000.0  # metres, to stand for infinity
AHEAD = 0.45  # cosine from the optical axis within which outlines may be seen


def paint_sky(labels: Labels, lens: Lens) -> None:
    """Paints clouds and skyline into the labels, which are SKY before."""
    far = _far_things()
    directions = far.directions @ lens.global_to_camera[:3, :3].T * FAR
    ahead = np.flatnonzero(directions.mean(axis=1)[:, 2] > FAR * AHEAD)
    for index, outline in zip(ahead, lens.outlines(directions[ahead]), strict=True):
        if outline is not None:
            cv2.fillPoly(labels, [outline], (int(far.labels[index]),), shift=SHIFT)


@dataclass(frozen=True)
class _FarThings:
    """Outlines of things at infinity, farthest first. N of them."""

    labels: list[Label]
    directions: Array  # (N, POINTS, 3) in the global frame


@cache
def _far_things() -> _FarThings:
    rng = np.random.default_rng(2)
    out: list[tuple[Label, Array]] = []
    turn = np.arange(POINTS) / POINTS * 2 * np.pi
    for number in range(CLOUDS):
        azimuth = (number + rng.uniform(-0.3, 0.3)) / CLOUDS * 2 * np.pi
        elevation, width = rng.uniform(0.16, 0.42), rng.uniform(0.1, 0.2)
        puffs = [
            (azimuth + width * at, elevation + width * rng.uniform(0.0, 0.14), width * rng.uniform(0.3, 0.5))
            for at in np.linspace(-0.8, 0.8, 5)
        ]
        for label, lower, scale in ((Label.CLOUD_SHADE, 0.08, 1.0), (Label.CLOUD, 0.0, 0.92)):
            for a, e, radius in puffs:
                az = a + scale * radius * np.cos(turn)
                # A flat base: what hangs below the middle is pressed together.
                rise = np.sin(turn) * np.where(np.sin(turn) < 0, 0.22, 0.62)
                out.append((label, _directions(az, e - lower * radius + scale * radius * rise)))
    for label, low, high in ((Label.FAR, 0.012, 0.075), (Label.TREES, 0.008, 0.034)):
        heights = rng.uniform(low, high, 360 // SKYLINE_STEP)
        for start in range(0, 360, CHUNK):
            degrees = np.arange(start, start + CHUNK, SKYLINE_STEP)
            az = np.deg2rad(np.repeat(degrees, 2) + np.tile([0.0, SKYLINE_STEP], len(degrees)))
            top = np.repeat(heights[degrees // SKYLINE_STEP], 2)
            bottom = np.deg2rad([float(start + CHUNK), float(start)])
            out.append((label, _directions(np.concatenate([az, bottom]), np.concatenate([top, [-0.01, -0.01]]))))
    return _FarThings([label for label, _ in out], np.stack([outline for _, outline in out]))


def _directions(azimuth: Array, elevation: Array) -> Array:
    return np.stack(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], axis=1
    )
