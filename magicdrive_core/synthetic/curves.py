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
    """A start pose and pieces of constant curvature, joined without a kink."""

    start: Pose
    pieces: tuple[tuple[float, float], ...]  # length in metres, curvature in 1/m (left is positive)

    @property
    def length(self) -> float:
        """Metres."""
        return sum(length for length, _ in self.pieces)

    @property
    def end(self) -> Pose:
        """The pose at the far end."""
        x, y, heading = self.poses([self.length])[0]
        return float(x), float(y), float(heading)

    def joined(self, other: Curve) -> Curve:
        """This curve, then ``other``, which starts where this one ends."""
        return Curve(self.start, self.pieces + other.pieces)

    def poses(self, distances: ArrayLike, offset: float = 0.0) -> Array:
        """Poses at distances (N,) in metres from the start, ``offset`` metres to the right: (N, 3) x, y, heading.

        Beyond either end the first or last piece goes on.
        """
        s = np.asarray(distances, dtype=np.float64)
        starts, knots = self._knots
        piece = np.clip(np.searchsorted(starts, s, side="right") - 1, 0, len(self.pieces) - 1)
        curvature = np.array([curvature for _, curvature in self.pieces])[piece]
        moved = _advance(knots[piece], s - starts[piece], curvature)
        moved[:, 0] += offset * np.sin(moved[:, 2])
        moved[:, 1] -= offset * np.cos(moved[:, 2])
        return moved

    def points(self, spacing: float, offset: float = 0.0) -> Array:
        """Points (N, 2) at most ``spacing`` metres apart; a straight piece gives its ends only."""
        starts, _ = self._knots
        distances = [0.0]
        for (length, curvature), start in zip(self.pieces, starts, strict=True):
            steps = max(1, int(np.ceil(length / spacing))) if curvature else 1
            distances += [start + length * step / steps for step in range(1, steps + 1)]
        return self.poses(distances, offset)[:, :2]

    def transformed(self, mirror: bool, angle: float, shift: tuple[float, float]) -> Curve:
        """The curve mirrored at the x axis if asked, then turned about the origin, then shifted."""
        sign = -1.0 if mirror else 1.0
        x, y = transform_points(np.array([self.start[:2]]), mirror, angle, shift)[0]
        pieces = tuple((length, sign * curvature) for length, curvature in self.pieces)
        return Curve((float(x), float(y), sign * self.start[2] + angle), pieces)

    @cached_property
    def _knots(self) -> tuple[Array, Array]:
        """Distance and pose at the start of each piece."""
        starts, poses = [0.0], [np.array(self.start)]
        for length, curvature in self.pieces[:-1]:
            starts.append(starts[-1] + length)
            poses.append(_advance(poses[-1][None], np.array([length]), np.array([curvature]))[0])
        return np.array(starts), np.stack(poses)


def transform_points(points: Array, mirror: bool, angle: float, shift: tuple[float, float]) -> Array:
    """Points (N, 2) mirrored at the x axis if asked, then turned about the origin, then shifted."""
    x, y = points[:, 0], -points[:, 1] if mirror else points[:, 1]
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([c * x - s * y + shift[0], s * x + c * y + shift[1]], axis=1)


def _advance(poses: Array, distances: Array, curvatures: Array) -> Array:
    """Poses (N, 3) moved along arcs: x += sin(k s / 2) / (k / 2) in the direction heading + k s / 2."""
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
