"""Oriented boxes in the lidar frame: rows of (x, y, z, w, l, h, yaw'), z at the centre, yaw' = -yaw - pi/2.

The nuScenes lidar frame has x right, y forward and z up. A box's own x axis is its length, so a box of yaw' = 0 has
its width along the lidar's x.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magicdrive_core.geometry.poses import rotation_matrix, transform

Array = NDArray[np.float64]

# Corners of the unit box about its centre, in the order that the network was trained with.
_UNIT = np.array(
    [[-1, -1, -1], [-1, -1, 1], [-1, 1, 1], [-1, 1, -1], [1, -1, -1], [1, -1, 1], [1, 1, 1], [1, 1, -1]],
    dtype=np.float64,
) * 0.5  # fmt: skip


def lidar_boxes(centres: ArrayLike, rotations: ArrayLike, sizes: ArrayLike, global_to_lidar: Array) -> Array:
    """Boxes of the global frame as rows of the lidar frame.

    Args:
        centres: (N, 3) metres, global.
        rotations: (N, 4) quaternions (w, x, y, z), box to global.
        sizes: (N, 3) width, length, height in metres.
        global_to_lidar: (4, 4).

    Returns:
        (N, 7); the heading is that of the box's x axis seen from above, small tilts are left out.
    """
    rotation = global_to_lidar[:3, :3] @ rotation_matrix(np.asarray(rotations, dtype=np.float64).reshape(-1, 4))
    headings = np.arctan2(rotation[:, 1, 0], rotation[:, 0, 0])
    centres = transform(global_to_lidar, np.asarray(centres, dtype=np.float64).reshape(-1, 3))
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 3)
    return np.concatenate([centres, sizes, (-headings - np.pi / 2)[:, None]], axis=1)


def corners(boxes: Array, *, published: bool = False) -> Array:
    """The eight corners of each box: (N, 7) -> (N, 8, 3) metres in the lidar frame.

    Args:
        boxes: rows of (x, y, z, w, l, h, yaw').
        published: take z as the bottom, so that every corner lies h/2 too high (oddity 2 of the published system,
            which its weights expect).
    """
    local = _UNIT * boxes[:, None, 3:6]
    if published:
        local[..., 2] += boxes[:, None, 5] / 2
    cosine, sine = np.cos(boxes[:, 6:]), np.sin(boxes[:, 6:])
    x, y, z = np.moveaxis(local, -1, 0)
    return np.stack([x * cosine + y * sine, y * cosine - x * sine, z], axis=-1) + boxes[:, None, :3]


def transform_boxes(boxes: Array, matrix: Array) -> Array:
    """Boxes (N, 7) of one frame as rows of another one.

    Args:
        boxes: rows of (x, y, z, w, l, h, yaw').
        matrix: (4, 4) rigid motion from their frame to the other.
    """
    headings = -boxes[:, 6] - np.pi / 2
    ahead = np.stack([np.cos(headings), np.sin(headings), np.zeros(len(boxes))], axis=1) @ matrix[:3, :3].T
    out = boxes.copy()
    out[:, :3] = transform(matrix, boxes[:, :3])
    out[:, 6] = -np.arctan2(ahead[:, 1], ahead[:, 0]) - np.pi / 2
    return out
