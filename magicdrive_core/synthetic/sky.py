"""Paint the sky: clouds and the skyline, which are so far away that only their direction matters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.synthetic.camera import SHIFT, PosedCamera
from magicdrive_core.synthetic.ground import Label, Labels

Array = NDArray[np.float64]

CLOUDS = 15
POINTS = 22  # points of each outline
SKYLINE_STEP = 2  # width of a building of the skyline, in degrees
CHUNK = 20  # width of an outline in degrees: two points for each building and two below make POINTS
FAR = 1000.0  # metres, in place of infinity
IN_VIEW = 0.45  # cosine of the angle from the optical axis within which outlines can be visible


def paint_sky(labels: Labels, camera: PosedCamera) -> None:
    """Paint clouds and skyline into labels, in place.

    Args:
        labels: (900, 1600) labels that are all SKY.
        camera: the camera; only its orientation matters.
    """
    far = _far_things()
    directions = far.directions @ camera.global_to_camera[:3, :3].T * FAR
    ahead = np.flatnonzero(directions.mean(axis=1)[:, 2] > FAR * IN_VIEW)
    for index, outline in zip(ahead, camera.outlines(directions[ahead]), strict=True):
        if outline is not None:
            cv2.fillPoly(labels, [outline], (int(far.labels[index]),), shift=SHIFT)


@dataclass(frozen=True)
class _FarThings:
    """N outlines at infinity, farthest first."""

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
                # Clouds have a flat base: points below the middle are compressed.
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
