"""Oriented boxes in the lidar frame: rows of (x, y, z, w, l, h, yaw') with z at the centre and yaw' = -yaw - pi/2.

The nuScenes lidar frame has x right, y forward and z up. The x axis of a box runs along its length, so a box of
yaw' = 0 has its width along the x axis of the lidar frame. Lengths are metres, angles radians.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magicdrive_core.geometry.poses import rotation_matrix, transform

Array = NDArray[np.float64]

# Corners of the unit box about its centre, in the order that the published weights were trained with.
_UNIT = np.array(
    [[-1, -1, -1], [-1, -1, 1], [-1, 1, 1], [-1, 1, -1], [1, -1, -1], [1, -1, 1], [1, 1, 1], [1, 1, -1]],
    dtype=np.float64,
) * 0.5  # fmt: skip


def lidar_boxes(centres: ArrayLike, rotations: ArrayLike, sizes: ArrayLike, global_to_lidar: Array) -> Array:
    """Convert boxes from the global frame to rows of the lidar frame.

    Args:
        centres: (N, 3) metres in the global frame.
        rotations: (N, 4) quaternions (w, x, y, z), box to global.
        sizes: (N, 3) width, length, height in metres.
        global_to_lidar: (4, 4) pose.

    Returns:
        (N, 7) rows; the heading is that of the box's x axis seen from above, so small tilts are lost.
    """
    rotation = global_to_lidar[:3, :3] @ rotation_matrix(np.asarray(rotations, dtype=np.float64).reshape(-1, 4))
    headings = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    centres = transform(global_to_lidar, np.asarray(centres, dtype=np.float64).reshape(-1, 3))
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 3)
    return np.concatenate([centres, sizes, (-headings - np.pi / 2)[:, None]], axis=1)


def corners(boxes: Array, *, published: bool = False) -> Array:
    """Compute the eight corners of each box.

    Args:
        boxes: (N, 7) rows of (x, y, z, w, l, h, yaw').
        published: take z as the bottom of the box, so that every corner is h/2 too high (oddity 2 of the published
            system, which its weights expect).

    Returns:
        (N, 8, 3) metres in the lidar frame.
    """
    local = _UNIT * boxes[:, None, 3:6]
    if published:
        local[..., 2] += boxes[:, None, 5] / 2
    cosine, sine = np.cos(boxes[:, 6:]), np.sin(boxes[:, 6:])
    x, y, z = np.moveaxis(local, -1, 0)
    return np.stack([x * cosine + y * sine, y * cosine - x * sine, z], axis=-1) + boxes[:, None, :3]


def transform_boxes(boxes: Array, matrix: Array) -> Array:
    """Transform boxes from one frame to another.

    Args:
        boxes: (N, 7) rows of (x, y, z, w, l, h, yaw').
        matrix: (4, 4) rigid motion from the frame of the boxes to the other frame.

    Returns:
        (N, 7) rows in the other frame.
    """
    headings = -boxes[:, 6] - np.pi / 2
    ahead = np.stack([np.cos(headings), np.sin(headings), np.zeros(len(boxes))], axis=1) @ matrix[:3, :3].T
    out = boxes.copy()
    out[:, :3] = transform(matrix, boxes[:, :3])
    out[:, 6] = -np.arctan2(ahead[:, 1], ahead[:, 0]) - np.pi / 2
    return out
