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
        distances = points @ PLANES.T - DEPTHS
        lowest, highest = distances.min(axis=0), distances.max(axis=0)
        if (highest < 0).any():
            return np.empty((0, 2), np.int32)
        for plane in np.flatnonzero(lowest < 0):
            points = _cut(points, points @ PLANES[plane] - DEPTHS[plane])
        return self.fixed(points)

    @cached_property
    def sides(self) -> Array:
        """(4, 3): p @ side < 0 says that a point of the camera frame lies beyond that side of the picture."""
        (fx, _, cx), (_, fy, cy) = self.intrinsics[:2]
        return np.array([[fx, 0, cx], [-fx, 0, PICTURE_WIDTH - cx], [0, fy, cy], [0, -fy, PICTURE_HEIGHT - cy]])

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
        out: list[Pixels | None] = [None] * len(polygons)
        z = polygons[..., 2]
        before = z >= NEAR
        seen = before.any(axis=1)
        for side in self.sides:
            seen &= (polygons @ side >= 0).any(axis=1)
        whole = before.all(axis=1)
        whole[seen] &= (np.abs(polygons[seen, :, :2]).max(axis=2) <= WIDE * z[seen]).all(axis=1)
        easy = np.flatnonzero(seen & whole)
        pixels = self.fixed(polygons[easy])
        extent = pixels.max(axis=1, initial=-(1 << 30)) - pixels.min(axis=1, initial=1 << 30)
        shown = extent.max(axis=1, initial=0) >= smallest * (1 << SHIFT)
        for index, outline in zip(easy[shown], pixels[shown], strict=True):
            out[index] = outline
        for index in np.flatnonzero(seen & ~whole):
            outline = self.outline(polygons[index])
            out[index] = outline if len(outline) else None
        return out


def _cut(points: Array, distance: Array) -> Array:
    """The part of a polygon with ``distance`` >= 0 (Sutherland-Hodgman; also right for the area of concave ones)."""
    following = np.concatenate([points[1:], points[:1]])
    after = np.concatenate([distance[1:], distance[:1]])
    inside = distance >= 0
    crosses = inside != (after >= 0)
    share = np.zeros(len(points))
    share[crosses] = distance[crosses] / (distance[crosses] - after[crosses])
    both = np.empty((len(points), 2, 3))
    both[:, 0] = points
    both[:, 1] = points + share[:, None] * (following - points)
    return both[np.column_stack([inside, crosses])]
