"""Rigid motions as 4x4 matrices, and unit quaternions (w, x, y, z).

A matrix ``a_to_b`` maps the coordinates of a point in frame a to its coordinates in frame b. Translations are metres.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def rotation_matrix(quaternion: ArrayLike) -> Array:
    """Convert quaternions to rotation matrices.

    Args:
        quaternion: (..., 4) as (w, x, y, z), of any length but 0; they are normalised first.

    Returns:
        (..., 3, 3).
    """
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def pose(rotation: ArrayLike, translation: ArrayLike) -> Array:
    """Build poses from rotations and translations.

    Args:
        rotation: (..., 4) quaternions (w, x, y, z) or (..., 3, 3) rotation matrices, broadcast against ``translation``.
        translation: (..., 3) metres.

    Returns:
        (..., 4, 4) matrices that rotate first and then translate.
    """
    rotation = np.asarray(rotation, dtype=np.float64)
    translation = np.asarray(translation, dtype=np.float64)
    matrix = rotation if rotation.shape[-2:] == (3, 3) else rotation_matrix(rotation)
    out = np.zeros((*translation.shape[:-1], 4, 4))
    out[..., :3, :3] = matrix
    out[..., :3, 3] = translation
    out[..., 3, 3] = 1.0
    return out


def inverse(matrix: Array) -> Array:
    """Invert rigid motions, without a general matrix inverse.

    Args:
        matrix: (..., 4, 4) of rotation and translation only; the last row must be (0, 0, 0, 1).

    Returns:
        (..., 4, 4): ``b_to_a`` for ``a_to_b``.
    """
    rotation = np.swapaxes(matrix[..., :3, :3], -1, -2)
    out = np.zeros_like(matrix)
    out[..., :3, :3] = rotation
    out[..., :3, 3] = -(rotation @ matrix[..., :3, 3:])[..., 0]
    out[..., 3, 3] = 1.0
    return out


def transform(matrix: Array, points: ArrayLike) -> Array:
    """Apply one rigid or affine motion to points.

    Args:
        matrix: (4, 4), ``a_to_b``.
        points: (..., 3) coordinates in frame a, in the unit of the matrix's translation (metres).

    Returns:
        (..., 3) coordinates in frame b.
    """
    return np.asarray(points, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def slerp(start: ArrayLike, end: ArrayLike, fraction: ArrayLike) -> Array:
    """Interpolate quaternions along the shorter great arc (spherical linear interpolation).

    Args:
        start: (..., 4) quaternions, which are normalised first.
        end: (..., 4) quaternions, which are normalised first.
        fraction: (...) in [0, 1], broadcast against both.

    Returns:
        (..., 4) unit quaternions.
    """
    a, b = (np.asarray(q, dtype=np.float64) for q in (start, end))
    a, b = (q / np.linalg.norm(q, axis=-1, keepdims=True) for q in (a, b))
    t = np.asarray(fraction, dtype=np.float64)[..., None]
    cosine = np.sum(a * b, axis=-1, keepdims=True)
    b = np.where(cosine < 0, -b, b)
    # The angle from both chords is precise on short arcs, where arccos of the cosine loses half of its digits.
    angle = 2 * np.arctan2(np.linalg.norm(a - b, axis=-1, keepdims=True), np.linalg.norm(a + b, axis=-1, keepdims=True))
    # sin(t angle) / sin(angle), where np.sinc(x) = sin(pi x) / (pi x) is finite at zero
    weight = t * np.sinc(t * angle / np.pi) / np.sinc(angle / np.pi)
    rest = (1 - t) * np.sinc((1 - t) * angle / np.pi) / np.sinc(angle / np.pi)
    mixed = rest * a + weight * b
    return mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)


def yaw(rotation: Array) -> float:
    """Compute the heading of the x axis of a rotation.

    Args:
        rotation: (3, 3), or a pose (4, 4), whose rotation is used.

    Returns:
        Radians about +z, counter-clockwise from the x axis, in [-pi, pi].
    """
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def multiply(a: ArrayLike, b: ArrayLike) -> Array:
    """Multiply quaternions (Hamilton product): the product rotates by ``b`` first, then by ``a``.

    Args:
        a: (..., 4) as (w, x, y, z).
        b: (..., 4), broadcast against ``a``.

    Returns:
        (..., 4); of unit length if both factors are.
    """
    w, x, y, z = np.moveaxis(np.asarray(a, dtype=np.float64), -1, 0)
    p, q, r, s = np.moveaxis(np.asarray(b, dtype=np.float64), -1, 0)
    return np.stack(
        [
            w * p - x * q - y * r - z * s,
            w * q + x * p + y * s - z * r,
            w * r - x * s + y * p + z * q,
            w * s + x * r - y * q + z * p,
        ],
        axis=-1,
    )


def quaternion(rotation: ArrayLike) -> Array:
    """Convert rotation matrices to unit quaternions.

    The outer product of a quaternion with itself is linear in its matrix; the longest column is the best conditioned.

    Args:
        rotation: (..., 3, 3) rotation matrices.

    Returns:
        (..., 4) as (w, x, y, z) with w >= 0.
    """
    m = np.asarray(rotation, dtype=np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    outer = np.stack(
        [
            np.stack([1 + xx + yy + zz, wx, wy, wz], axis=-1),
            np.stack([wx, 1 + xx - yy - zz, xy, xz], axis=-1),
            np.stack([wy, xy, 1 - xx + yy - zz, yz], axis=-1),
            np.stack([wz, xz, yz, 1 - xx - yy + zz], axis=-1),
        ],
        axis=-2,
    )
    longest = np.argmax(np.einsum("...ii->...i", outer), axis=-1)
    q = np.take_along_axis(outer, longest[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., :1] < 0, -q, q)
