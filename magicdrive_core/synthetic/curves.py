"""Plane curves of straight lines and arcs: the centre lines of lanes, and the paths that traffic follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Pose = tuple[float, float, float]  # x, y in metres, heading in radians


@dataclass(frozen=True)
class Curve:
    """A start pose and pieces of constant curvature, with continuous heading."""

    start: Pose
    pieces: tuple[tuple[float, float], ...]  # length in metres, curvature in 1/m (positive to the left)

    @property
    def length(self) -> float:
        """Length of the curve in metres."""
        return sum(length for length, _ in self.pieces)

    @property
    def end(self) -> Pose:
        """Pose at the end of the curve: x, y in metres, heading in radians."""
        x, y, heading = self.poses([self.length])[0]
        return float(x), float(y), float(heading)

    def joined(self, other: Curve) -> Curve:
        """Append another curve.

        Args:
            other: a curve that starts at the end of this one; its start pose is not used.

        Returns:
            The joined curve.
        """
        return Curve(self.start, self.pieces + other.pieces)

    def poses(self, distances: ArrayLike, offset: float = 0.0) -> Array:
        """Compute poses along the curve; beyond either end, the first or last piece continues.

        Args:
            distances: (N,) metres from the start.
            offset: metres to the right of the curve.

        Returns:
            (N, 3) x, y in metres and heading in radians.
        """
        s = np.asarray(distances, dtype=np.float64)
        starts, knots = self._knots
        piece = np.clip(np.searchsorted(starts, s, side="right") - 1, 0, len(self.pieces) - 1)
        curvature = np.array([curvature for _, curvature in self.pieces])[piece]
        poses = _advance(knots[piece], s - starts[piece], curvature)
        poses[:, 0] += offset * np.sin(poses[:, 2])
        poses[:, 1] -= offset * np.cos(poses[:, 2])
        return poses

    def points(self, spacing: float, offset: float = 0.0) -> Array:
        """Sample points along the curve; a straight piece gives only its ends.

        Args:
            spacing: largest distance between points of an arc, in metres.
            offset: metres to the right of the curve.

        Returns:
            (N, 2) metres.
        """
        starts, _ = self._knots
        distances = [0.0]
        for (length, curvature), start in zip(self.pieces, starts, strict=True):
            steps = max(1, int(np.ceil(length / spacing))) if curvature else 1
            distances += [start + length * step / steps for step in range(1, steps + 1)]
        return self.poses(distances, offset)[:, :2]

    def transformed(self, mirror: bool, angle: float, shift: tuple[float, float]) -> Curve:
        """Transform the curve like ``transform_points``.

        Args:
            mirror: whether to mirror at the x axis first, which swaps left and right turns.
            angle: rotation about the origin in radians, counter-clockwise.
            shift: metres along x and y.

        Returns:
            The transformed curve, of the same length.
        """
        sign = -1.0 if mirror else 1.0
        x, y = transform_points(np.array([self.start[:2]]), mirror, angle, shift)[0]
        pieces = tuple((length, sign * curvature) for length, curvature in self.pieces)
        return Curve((float(x), float(y), sign * self.start[2] + angle), pieces)

    @cached_property
    def _knots(self) -> tuple[Array, Array]:
        """Distance (P,) and pose (P, 3) at the start of each piece."""
        starts, poses = [0.0], [np.array(self.start)]
        for length, curvature in self.pieces[:-1]:
            starts.append(starts[-1] + length)
            poses.append(_advance(poses[-1][None], np.array([length]), np.array([curvature]))[0])
        return np.array(starts), np.stack(poses)


def transform_points(points: Array, mirror: bool, angle: float, shift: tuple[float, float]) -> Array:
    """Mirror points at the x axis if asked, then rotate them about the origin, then shift them.

    Args:
        points: (N, 2) metres.
        mirror: whether to mirror at the x axis.
        angle: radians, counter-clockwise.
        shift: metres along x and y.

    Returns:
        (N, 2) metres.
    """
    x, y = points[:, 0], -points[:, 1] if mirror else points[:, 1]
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c * x - s * y + shift[0], s * x + c * y + shift[1]], axis=1)


def _advance(poses: Array, distances: Array, curvatures: Array) -> Array:
    """Move poses (N, 3) along arcs: by sin(k s / 2) / (k / 2) in the direction heading + k s / 2."""
    half = curvatures * distances / 2
    chord = distances * np.sinc(half / np.pi)  # sinc(x / pi) = sin(x) / x, 1 on straight lines
    direction = poses[:, 2] + half
    return np.stack(
        [
            poses[:, 0] + chord * np.cos(direction),
            poses[:, 1] + chord * np.sin(direction),
            poses[:, 2] + 2 * half,
        ],
        axis=1,
    )
