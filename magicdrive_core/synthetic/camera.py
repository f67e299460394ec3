"""A posed pinhole camera: projection, clipping, and rounding to fixed-point pixels.

Coordinates are rounded to 1/16 pixel before any pixel is chosen, and everything after that is integer arithmetic, so
that rounding differences between the mathematical libraries of two machines do not change a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH

Array = NDArray[np.float64]
Pixels = NDArray[np.int32]  # (K, 2) column, row in 1/16 pixel; pixel centres are at integers

SHIFT = 4  # fractional bits of fixed-point coordinates
NEAR = 0.2  # near plane in metres
WIDE = 4.0  # tangent of the clipping pyramid: its sides are about 5,000 pixels from the centre
CLIP_PLANES = np.array([[0, 0, 1], [1, 0, WIDE], [-1, 0, WIDE], [0, 1, WIDE], [0, -1, WIDE]])
PLANE_DISTANCES = np.array([NEAR, 0, 0, 0, 0])


@dataclass(frozen=True)
class PosedCamera:
    """A pinhole camera at one time, with the ground plane below the ego car."""

    intrinsics: Array  # (3, 3) pixels
    camera_to_global: Array  # (4, 4)
    ego_to_global: Array  # (4, 4); the ground plane is z = 0 in the ego frame

    @cached_property
    def global_to_camera(self) -> Array:
        """The (4, 4) inverse of ``camera_to_global``."""
        return poses.inverse(self.camera_to_global)

    @property
    def eye(self) -> Array:
        """Position (3,) of the camera in metres in the global frame."""
        return self.camera_to_global[:3, 3]

    @cached_property
    def height(self) -> float:
        """Height of the camera above the ground plane in metres."""
        return float((self.eye - self.ego_to_global[:3, 3]) @ self.ego_to_global[:3, 2])

    @cached_property
    def lift(self) -> Array:
        """The matrix that puts a point of the map on the ground plane.

        Returns:
            (4, 3) from (x, y, 1) in the global frame to (x, y, z, 1) in the global frame, in metres.
        """
        normal, origin = self.ego_to_global[:3, 2], self.ego_to_global[:3, 3]
        slope = -normal[:2] / normal[2]
        z = [slope[0], slope[1], origin[2] - slope @ origin[:2]]
        return np.array([[1, 0, 0], [0, 1, 0], z, [0, 0, 1]])

    @cached_property
    def horizon(self) -> float:
        """Row of the horizon of the ground plane in pixels, in the column of the principal point."""
        normal = self.camera_to_global[:3, :3].T @ self.ego_to_global[:3, 2]  # in the camera frame, about -y
        return float(self.intrinsics[1, 2] - self.intrinsics[1, 1] * normal[2] / normal[1])

    def from_ground(self, points: Array) -> Array:
        """Transform points of the map, on the ground plane, to the camera frame.

        Args:
            points: (..., 2) x and y in metres in the global frame.

        Returns:
            (..., 3) metres in the camera frame.
        """
        matrix = (self.global_to_camera @ self.lift)[:3]
        return points @ matrix[:, :2].T + matrix[:, 2]

    def from_global(self, points: Array) -> Array:
        """Transform points from the global to the camera frame.

        Args:
            points: (..., 3) metres in the global frame.

        Returns:
            (..., 3) metres in the camera frame.
        """
        return poses.transform(self.global_to_camera, points)

    def outline(self, points: Array) -> Pixels:
        """Project one polygon, clipped at the near plane and at a pyramid wider than the picture.

        Args:
            points: (K, 3) metres in the camera frame, at any depth.

        Returns:
            The outline in fixed-point pixels, with more or fewer points than the polygon; no rows if all of it is
            outside.
        """
        distances = points @ CLIP_PLANES.T - PLANE_DISTANCES
        lowest, highest = distances.min(axis=0), distances.max(axis=0)
        if (highest < 0).any():
            return np.empty((0, 2), np.int32)
        for plane in np.flatnonzero(lowest < 0):
            points = _cut(points, points @ CLIP_PLANES[plane] - PLANE_DISTANCES[plane])
        return self.fixed(points)

    @cached_property
    def sides(self) -> Array:
        """Normals of the view frustum: a point p of the camera frame is outside if p @ side < 0 for any side.

        Returns:
            (4, 3) for the left, right, upper and lower side, not normalised.
        """
        (fx, _, cx), (_, fy, cy) = self.intrinsics[:2]
        return np.array([[fx, 0, cx], [-fx, 0, PICTURE_WIDTH - cx], [0, fy, cy], [0, -fy, PICTURE_HEIGHT - cy]])

    def fixed(self, points: Array) -> Pixels:
        """Project points in front of the near plane to fixed-point pixels.

        Args:
            points: (..., 3) metres in the camera frame, with z of at least ``NEAR``.

        Returns:
            (..., 2) column and row in 1/16 pixel; pixel centres are at integers, as in OpenCV.
        """
        k = self.intrinsics
        x = points[..., 0] / points[..., 2] * k[0, 0] + k[0, 2]
        y = points[..., 1] / points[..., 2] * k[1, 1] + k[1, 2]
        # Pixel centres are at integer + 0.5 in nuScenes' coordinates, and at integers in OpenCV's.
        return np.rint((np.stack([x, y], axis=-1) - 0.5) * (1 << SHIFT)).astype(np.int32)

    def outlines(self, polygons: Array, smallest: float = 0.0) -> list[Pixels | None]:
        """Project many polygons of the camera frame.

        Args:
            polygons: (N, K, 3) metres; a polygon of fewer than K points repeats its last one.
            smallest: leave out polygons whose width and height are both below this many pixels.

        Returns:
            The outline of each polygon in fixed-point pixels, None if the picture does not show it.
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
    """Clip a polygon to ``distance`` >= 0 (Sutherland-Hodgman; the filled area is right for concave polygons too)."""
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
