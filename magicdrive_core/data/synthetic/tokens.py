"""Stable names for records and rounded numbers for tables: the same world has the same bytes on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike


def token(*names: object) -> str:
    """32 hex digits that stand for a record, as nuScenes' tokens do."""
    return hashlib.md5("/".join(map(str, names)).encode(), usedforsecurity=False).hexdigest()


def rounded(values: ArrayLike, digits: int = 4) -> list[float]:
    """A vector for a table: fixed digits, and no negative zero."""
    return [round(float(value), digits) + 0.0 for value in np.asarray(values)]


def heading_quaternion(heading: float) -> list[float]:
    """The rotation (w, x, y, z) about the vertical axis by an angle in radians."""
    return rounded([np.cos(heading / 2), 0, 0, np.sin(heading / 2)], 7)
