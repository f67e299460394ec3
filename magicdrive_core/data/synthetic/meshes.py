"""Shapes of things in a unit box: x forward, y left in [-1/2, 1/2], z up in [0, 1]; scaled to each object's size.

A mesh is made of convex parts, told apart by planes; seen from anywhere, the parts on the far side of a plane are
drawn first, so that no depth buffer is needed. Flat details (wheels, windows, lamps) follow the face they lie on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magicdrive_core.data.synthetic.materials import Material

Array = NDArray[np.float64]
POINTS = 8  # of a face; faces with less repeat their last


@dataclass(frozen=True)
class Face:
    """A flat polygon, counter-clockwise seen from outside."""

    points: Array  # (K, 3)
    material: Material


@dataclass(frozen=True)
class Split:
    """A plane across an axis that has one part of a mesh below it and another above it."""

    axis: int
    value: float
    below: Node
    above: Node


Node = Split | list[Face]
Tree: TypeAlias = "list[int] | tuple[int, Tree, Tree]"  # numbers of faces; of a plane, and what is below and above it


@dataclass(frozen=True)
class Mesh:
    """A shape, ready to be drawn many times. F faces."""

    faces: Array  # (F, POINTS, 3)
    normals: Array  # (F, 3) of the unit box, not normalised
    materials: NDArray[np.int64]  # (F,)
    planes: list[tuple[int, float]]  # axis and value of each split
    orders: NDArray[np.int64]  # (2 ** splits, F) faces far to near, by the bits that say above which planes the eye is

    def order(self, eye: Array) -> NDArray[np.int64]:
        """The drawing orders (N, F) for eyes (N, 3) in the unit box's coordinates."""
        code = np.zeros(len(eye), np.int64)
        for bit, (axis, value) in enumerate(self.planes):
            code += (eye[:, axis] > value).astype(np.int64) << bit
        return self.orders[code]


def mesh(node: Node) -> Mesh:
    """Prepares a tree of parts."""
    faces: list[Face] = []
    planes: list[tuple[int, float]] = []
    tree = _number(node, faces, planes)
    points = np.stack([_padded(face.points) for face in faces])
    codes = product((False, True), repeat=len(planes))
    orders = [_ordered(tree, bits[::-1]) for bits in codes]
    return Mesh(
        faces=points,
        normals=np.stack([_normal(face.points) for face in faces]),
        materials=np.array([face.material for face in faces]),
        planes=planes,
        orders=np.array(orders),
    )


def box(x: ArrayLike, y: ArrayLike, z: ArrayLike, material: Material, top: Material | None = None) -> list[Face]:
    """A box from its extents."""
    (x0, x1), (y0, y1), (z0, z1) = (np.asarray(v, dtype=float) for v in (x, y, z))
    return prism([(x0, z0), (x1, z0), (x1, z1), (x0, z1)], (y0, y1), material, top=top)


def prism(
    profile: Sequence[tuple[float, float]],
    y: tuple[float, float],
    material: Material,
    inset: float = 0.0,
    top: Material | None = None,
) -> list[Face]:
    """A convex outline (x, z), counter-clockwise with x right and z up, drawn out from y[0] to y[1].

    Args:
        profile: the outline.
        y: its extent across.
        material: of all faces.
        inset: how much narrower each side is at the highest point, in unit lengths.
        top: of the faces that look up, where they differ.
    """
    outline = np.array(profile, dtype=np.float64)
    low, high = outline[:, 1].min(), outline[:, 1].max()
    narrow = inset * (outline[:, 1] - low) / (high - low)
    right = np.stack([outline[:, 0], y[0] + narrow, outline[:, 1]], axis=1)
    left = np.stack([outline[:, 0], y[1] - narrow, outline[:, 1]], axis=1)
    faces = [Face(right, material), Face(left[::-1], material)]
    for index in range(len(outline)):
        after = (index + 1) % len(outline)
        face = np.stack([right[index], left[index], left[after], right[after]])
        face = (
            face[::-1]
            if _normal(face) @ (face.mean(axis=0) - (right.mean(axis=0) + left.mean(axis=0)) / 2) < 0
            else face
        )
        level = abs(outline[after, 1] - outline[index, 1]) < 0.05 and outline[index, 1] > (low + high) / 2
        faces.append(Face(face, top if top is not None and level else material))
    return faces


def ball(x: ArrayLike, y: ArrayLike, z: ArrayLike, material: Material, around: int = 8) -> list[Face]:
    """A faceted ball in a box from its extents."""
    (x0, x1), (y0, y1), (z0, z1) = (np.asarray(v, dtype=float) for v in (x, y, z))
    turn = np.arange(around) / around * 2 * np.pi
    rings = []
    for height, radius in ((0.0, 0.35), (0.22, 0.85), (0.55, 1.0), (0.85, 0.68), (1.0, 0.25)):
        rings.append(
            np.stack(
                [
                    (x0 + x1) / 2 + (x1 - x0) / 2 * radius * np.cos(turn),
                    (y0 + y1) / 2 + (y1 - y0) / 2 * radius * np.sin(turn),
                    np.full(around, z0 + (z1 - z0) * height),
                ],
                axis=1,
            )
        )
    faces = [Face(rings[0][::-1], material), Face(rings[-1], material)]
    for low, high in pairwise(rings):
        for index in range(around):
            after = (index + 1) % around
            faces.append(Face(np.stack([low[index], low[after], high[after], high[index]]), material))
    return faces


def side(x: ArrayLike, z: ArrayLike, y: float, material: Material, slope: float = 0.0) -> list[Face]:
    """A rectangle on a side of the box: the left where y > 0. ``slope`` is how far the top leans inwards."""
    (x0, x1), (z0, z1) = (np.asarray(v, dtype=float) for v in (x, z))
    inner = y - np.sign(y) * slope
    points = np.array([[x0, y, z0], [x1, y, z0], [x1, inner, z1], [x0, inner, z1]])
    return [Face(points[::-1] if y > 0 else points, material)]


def end(y: ArrayLike, z: ArrayLike, x: ArrayLike, material: Material) -> list[Face]:
    """A rectangle on the front (x > 0) or the back; ``x`` is one value, or those of the lower and the upper edge."""
    (y0, y1), (z0, z1) = (np.asarray(v, dtype=float) for v in (y, z))
    low, high = np.broadcast_to(np.asarray(x, dtype=float), 2)
    points = np.array([[low, y0, z0], [low, y1, z0], [high, y1, z1], [high, y0, z1]])
    return [Face(points if low + high > 0 else points[::-1], material)]


def wheels(
    x: Sequence[float], radius: float, length: float, height: float, width: float = 0.5, z: float | None = None
) -> list[Face]:
    """Discs on both sides, with hubs; ``radius`` in metres on a box ``length`` long and ``height`` high."""
    turn = (np.arange(POINTS) + 0.5) / POINTS * 2 * np.pi
    faces = []
    for y, centre, (share, material) in product((-width, width), x, ((1.0, Material.TYRE), (0.5, Material.HUB))):
        level = radius if z is None else z
        disc = np.stack(
            [
                centre + share * radius / length * np.cos(turn),
                np.full(POINTS, y),
                level / height + share * radius / height * np.sin(turn),
            ],
            axis=1,
        )
        faces.append(Face(disc[::-1] if y > 0 else disc, material))
    return faces


def _number(node: Node, faces: list[Face], planes: list[tuple[int, float]]) -> Tree:
    """Replaces faces and planes by their numbers."""
    if isinstance(node, Split):
        bit = len(planes)
        planes.append((node.axis, node.value))
        return bit, _number(node.below, faces, planes), _number(node.above, faces, planes)
    first = len(faces)
    faces.extend(node)
    return list(range(first, len(faces)))


def _ordered(tree: Tree, above: tuple[bool, ...]) -> list[int]:
    if isinstance(tree, list):
        return tree
    bit, lower, upper = tree
    far, near = (lower, upper) if above[bit] else (upper, lower)
    return _ordered(far, above) + _ordered(near, above)


def _padded(points: Array) -> Array:
    return np.concatenate([points, np.repeat(points[-1:], POINTS - len(points), axis=0)])


def _normal(points: Array) -> Array:
    """Newell's normal of a polygon: right for any of them, also where points repeat."""
    after = np.roll(points, -1, axis=0)
    return np.cross(points, after).sum(axis=0)
