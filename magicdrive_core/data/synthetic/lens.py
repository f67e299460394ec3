"""From the world to pixels: projection, clipping, and rounding to fixed-point coordinates.

Coordinates are rounded to 1/16 pixel before any pixel is chosen, and everything after that is integer arithmetic. So
the last-digit differences between the mathematical libraries of two machines do not reach a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH

Array = NDArray[np.float64]
Pixels = NDArray[np.int32]  # (K, 2) column, row in 1/16 pixel of a raster whose pixel centres are whole numbers

SHIFT = 4
NEAR = 0.2  # metres before the camera at which polygons are cut
WIDE = 4.0  # tangent of the pyramid outside of which polygons are cut: about 5,000 pixels from the centre
PLANES = np.array([[0, 0, 1], [1, 0, WIDE], [-1, 0, WIDE], [0, 1, WIDE], [0, -1, WIDE]])
DEPTHS = np.array([NEAR, 0, 0, 0, 0])


@dataclass(frozen=True)
class Lens:
    """One camera at one moment."""

    intrinsics: Array  # (3, 3) pixels
    camera_to_global: Array  # (4, 4)
    ego_to_global: Array  # (4, 4); the ground is the ego frame's plane z = 0

    @cached_property
    def global_to_camera(self) -> Array:
        """(4, 4)."""
        return poses.inverse(self.camera_to_global)

    @property
    def eye(self) -> Array:
        """The camera's position (3,) in the global frame."""
        return self.camera_to_global[:3, 3]

    @cached_property
    def height(self) -> float:
        """Metres of the camera above the ground plane."""
        return float((self.eye - self.ego_to_global[:3, 3]) @ self.ego_to_global[:3, 2])

    @cached_property
    def lift(self) -> Array:
        """(4, 3): global x, y, 1 to the homogeneous point x, y, z, 1 of the ground plane above or below."""
        normal, origin = self.ego_to_global[:3, 2], self.ego_to_global[:3, 3]
        slope = -normal[:2] / normal[2]
        z = [slope[0], slope[1], origin[2] - slope @ origin[:2]]
        return np.array([[1, 0, 0], [0, 1, 0], z, [0, 0, 1]])

    @cached_property
    def horizon(self) -> float:
        """Row of the ground plane's horizon in the picture's middle column."""
        normal = self.camera_to_global[:3, :3].T @ self.ego_to_global[:3, 2]  # in the camera frame, about -y
        return float(self.intrinsics[1, 2] - self.intrinsics[1, 1] * normal[2] / normal[1])

    def ground(self, points: Array) -> Array:
        """Points (..., 2) of the map in the camera frame (..., 3), laid on the ground plane."""
        matrix = (self.global_to_camera @ self.lift)[:3]
        return points @ matrix[:, :2].T + matrix[:, 2]

    def camera(self, points: Array) -> Array:
        """Global points (..., 3) in the camera frame."""
        return poses.transform(self.global_to_camera, points)

    def outline(self, points: Array) -> Pixels:
        """One polygon (K, 3) of the camera frame as pixels, cut at the near plane; no rows where it is behind."""
        for normal, depth in zip(PLANES, DEPTHS, strict=True):
            distance = points @ normal - depth
            if distance.min(initial=0) < 0:
                points = _cut(points, distance)
        return self.fixed(points)

    def fixed(self, points: Array) -> Pixels:
        """Points (..., 3) before the near plane as fixed-point pixels (..., 2)."""
        k = self.intrinsics
        x = points[..., 0] / points[..., 2] * k[0, 0] + k[0, 2]
        y = points[..., 1] / points[..., 2] * k[1, 1] + k[1, 2]
        # Pixel centres lie at +0.5 in nuScenes' coordinates, and at whole numbers in the raster's.
        return np.rint((np.stack([x, y], axis=-1) - 0.5) * (1 << SHIFT)).astype(np.int32)

    def outlines(self, polygons: Array, smallest: float = 0.0) -> list[Pixels | None]:
        """Many polygons (N, K, 3) of the camera frame; None for those that the picture does not show.

        Args:
            polygons: repeat the last point where a polygon has less than K.
            smallest: polygons narrower and lower than this many pixels are left out.
        """
        x, y, z = polygons[..., 0], polygons[..., 1], polygons[..., 2]
        safe = ((z >= NEAR) & (np.abs(x) <= WIDE * z) & (np.abs(y) <= WIDE * z)).all(axis=1)
        out: list[Pixels | None] = [None] * len(polygons)
        easy = np.flatnonzero(safe)
        pixels = self.fixed(polygons[easy])
        shown = _shown(pixels.min(axis=1, initial=1 << 30), pixels.max(axis=1, initial=-(1 << 30)), smallest)
        for index, outline in zip(easy[shown], pixels[shown], strict=True):
            out[index] = outline
        for index in np.flatnonzero(~safe & (z > NEAR).any(axis=1)):
            outline = self.outline(polygons[index])
            if len(outline) and _shown(outline.min(axis=0), outline.max(axis=0), smallest):
                out[index] = outline
        return out


def _shown(low: Pixels, high: Pixels, smallest: float) -> NDArray[np.bool_]:
    inside = (high >= 0).all(axis=-1) & (low[..., 0] < PICTURE_WIDTH << SHIFT) & (low[..., 1] < PICTURE_HEIGHT << SHIFT)
    return inside & ((high - low).max(axis=-1) >= smallest * (1 << SHIFT))


def _cut(points: Array, distance: Array) -> Array:
    """The part of a polygon with ``distance`` >= 0 (Sutherland-Hodgman; also right for the area of concave ones)."""
    following, after = np.roll(points, -1, axis=0), np.roll(distance, -1)
    inside = distance >= 0
    crosses = inside != (after >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (distance / (distance - after))[:, None]
        meeting = points + share * (following - points)
    keep = np.stack([inside, crosses], axis=1)
    return np.stack([points, meeting], axis=1)[keep]
