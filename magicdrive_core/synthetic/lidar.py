"""A coarse spinning lidar: rays cast against the ground plane and the boxes of the scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from einops import rearrange, repeat
from numpy.typing import NDArray

Array = NDArray[np.float64]

BEAMS = np.deg2rad(np.linspace(-30.67, 10.67, 32))  # elevations of a Velodyne HDL-32E


RANGE = 60.0  # metres


INSIDE = 0.01  # metres that a return is moved behind the surface, so that rounding leaves it inside its box


@dataclass(frozen=True)
class Sweep:
    """The result of one turn of the lidar."""

    points: NDArray[np.float32]  # (P, 5): x, y, z in the lidar frame, intensity, beam
    hits: NDArray[np.int64]  # (N,) number of returns from each box
    rays: NDArray[np.int64]  # (N,) number of rays that would meet each box if nothing occluded it


def scan(boxes: Array, lidar_to_global: Array, azimuths: int) -> Sweep:
    """Cast ``azimuths`` x 32 rays.

    Args:
        boxes: (N, 7) upright boxes in the global frame: x, y, z of the centre, w, l, h in metres, heading in radians.
        lidar_to_global: (4, 4) pose of the lidar, above the ground plane z = 0.
        azimuths: number of columns (A) of the turn.

    Returns:
        The returns within ``RANGE``, and how many rays hit and would hit each box.
    """
    turn = (np.arange(azimuths) + 0.5) / azimuths * 2 * np.pi - np.pi
    flat = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    up, out = np.sin(BEAMS), np.cos(BEAMS)
    local = np.concatenate(
        [rearrange(flat, "a c -> a 1 c") * rearrange(out, "b -> b 1"), repeat(up, "b -> a b 1", a=azimuths)], axis=-1
    )  # (A, 32, 3)
    rays = local @ lidar_to_global[:3, :3].T  # (A, 32, 3)
    origin = lidar_to_global[:3, 3]
    with np.errstate(divide="ignore"):
        depth = np.where(rays[..., 2] < 0, -origin[2] / rays[..., 2], np.inf)
    owner = np.full(depth.shape, -1)
    met = np.zeros(len(boxes), np.int64)
    heading = np.arctan2(
        rays[:, 0, 1], rays[:, 0, 0]
    )  # (A,) heading of each column in the global frame, nearly equal for all beams
    away = np.linalg.norm(boxes[:, :2] - origin[:2], axis=1) - np.linalg.norm(boxes[:, 3:5], axis=1) / 2
    for index in np.flatnonzero(away < RANGE):
        box = boxes[index]
        columns = _columns(box, origin, heading)
        distance = _enter(box, origin, rays[columns])
        met[index] = np.count_nonzero(distance < RANGE)
        nearer = distance < depth[columns]
        rows, beams = np.nonzero(nearer)
        depth[columns[rows], beams] = distance[rows, beams]
        owner[columns[rows], beams] = index
    seen = depth < RANGE
    points = local[seen] * (depth[seen] + INSIDE * (owner[seen] >= 0))[:, None]
    beam = np.broadcast_to(np.arange(len(BEAMS)), depth.shape)[seen]
    intensity = np.where(owner[seen] >= 0, 40.0, 12.0)
    return Sweep(
        points=np.column_stack([np.round(points, 3), intensity, beam]).astype(np.float32),
        hits=np.bincount(owner[seen & (owner >= 0)], minlength=len(boxes)),
        rays=met,
    )


def _columns(box: Array, origin: Array, heading: Array) -> NDArray[np.int64]:
    """Find the columns whose rays can meet a box."""
    away = box[:2] - origin[:2]
    distance, radius = float(np.hypot(*away)), float(np.hypot(box[3], box[4])) / 2
    if distance <= radius:
        return np.arange(len(heading))
    off = (heading - np.arctan2(away[1], away[0]) + np.pi) % (2 * np.pi) - np.pi
    return np.flatnonzero(np.abs(off) < np.arcsin(radius / distance) + 0.05)


def _enter(box: Array, origin: Array, rays: Array) -> Array:
    """Compute the distance along each ray (..., 3) at which it enters a box; infinite if it misses."""
    c, s = np.cos(box[6]), np.sin(box[6])
    turn = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    start, direction = turn @ (origin - box[:3]), rays @ turn.T
    half = box[[4, 3, 5]] / 2
    # Along each axis, a ray is between the two faces for distances around -start / direction (slab method).
    with np.errstate(divide="ignore", invalid="ignore"):
        middle, width = -start / direction, half / np.abs(direction)
    near, far = (middle - width).max(axis=-1), (middle + width).min(axis=-1)
    return np.where((near < far) & (near > 0), near, np.inf)
