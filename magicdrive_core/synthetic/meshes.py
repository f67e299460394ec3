"""Meshes of the ten detection classes and of scenery, in a unit box that is scaled to the size of each object.

In the unit box x is forward and y left in [-1/2, 1/2], z is up in [0, 1]. A mesh consists of convex parts separated by
planes (a binary space partition): from any position, the parts beyond a plane are drawn first, so that no depth buffer
is needed. Flat details (wheels, windows, lamps) come after the face that they are on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from magicdrive_core.synthetic.materials import Material

Array = NDArray[np.float64]
POINTS = 8  # points of a face; smaller faces repeat their last point


@dataclass(frozen=True)
class Face:
    """A flat polygon, counter-clockwise when seen from outside."""

    points: Array  # (K, 3)
    material: Material


@dataclass(frozen=True)
class Split:
    """A plane perpendicular to an axis that separates two parts of a mesh."""

    axis: int
    value: float  # position on the axis
    below: Node
    above: Node


Node = Split | list[Face]
Tree: TypeAlias = (
    "list[int] | tuple[int, Tree, Tree]"  # indices of faces; or index of a plane, and the parts below and above it
)


@dataclass(frozen=True)
class Mesh:
    """A mesh of F faces, prepared for drawing."""

    faces: Array  # (F, POINTS, 3)
    normals: Array  # (F, 3) of the unit box, not normalised
    materials: NDArray[np.int64]  # (F,)
    planes: list[tuple[int, float]]  # axis and value of each plane
    orders: NDArray[np.int64]  # (2 ** planes, F) faces far to near; bit b of the row: eye above plane b

    def order(self, eye: Array) -> NDArray[np.int64]:
        """Look up the drawing orders of the faces.

        Args:
            eye: (N, 3) positions of the eye in coordinates of the unit box.

        Returns:
            (N, F) indices of faces, far to near.
        """
        code = np.zeros(len(eye), np.int64)
        for bit, (axis, value) in enumerate(self.planes):
            code += (eye[:, axis] > value).astype(np.int64) << bit
        return self.orders[code]


def build_mesh(node: Node) -> Mesh:
    """Prepare the mesh of a tree of parts.

    Args:
        node: a convex part as a list of faces, or a plane with the parts on either side; details follow the face that
            they are on.

    Returns:
        The mesh, with a drawing order for each combination of sides that the eye can be on.
    """
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
    """Make a box.

    Args:
        x: lower and upper end along x in the unit box.
        y: ends along y.
        z: ends along z.
        material: material of all faces.
        top: material of the upper face, if it differs.

    Returns:
        Six faces.
    """
    (x0, x1), (y0, y1), (z0, z1) = (np.asarray(v, dtype=float) for v in (x, y, z))
    return prism([(x0, z0), (x1, z0), (x1, z1), (x0, z1)], (y0, y1), material, top=top)


def prism(
    profile: Sequence[tuple[float, float]],
    y: tuple[float, float],
    material: Material,
    inset: float = 0.0,
    top: Material | None = None,
) -> list[Face]:
    """Extrude a convex outline from y[0] to y[1].

    Args:
        profile: points (x, z) of the outline, counter-clockwise with x to the right and z up.
        y: extent of the prism.
        material: material of all faces.
        inset: how far each side leans in at the highest point, in unit lengths.
        top: material of faces that look up, if it differs.

    Returns:
        The right and left face, then one face for each edge of the outline.
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
    """Make a faceted ball.

    Args:
        x: lower and upper end along x in the unit box.
        y: ends along y.
        z: ends along z.
        material: material of all faces.
        around: number of facets in each ring, at most ``POINTS``.

    Returns:
        The faces of its bottom, its top and four rings.
    """
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
    """Make a rectangle on the left or right side.

    Args:
        x: lower and upper end along x in the unit box.
        z: ends along z.
        y: position of the lower edge; the rectangle looks to the left if it is positive, otherwise to the right.
        material: material of the face.
        slope: how far the upper edge leans in, in unit lengths.

    Returns:
        One face.
    """
    (x0, x1), (z0, z1) = (np.asarray(v, dtype=float) for v in (x, z))
    inner = y - np.sign(y) * slope
    points = np.array([[x0, y, z0], [x1, y, z0], [x1, inner, z1], [x0, inner, z1]])
    return [Face(points[::-1] if y > 0 else points, material)]


def end(y: ArrayLike, z: ArrayLike, x: ArrayLike, material: Material) -> list[Face]:
    """Make a rectangle on the front or back.

    Args:
        y: lower and upper end along y in the unit box.
        z: ends along z.
        x: position, or those of the lower and upper edge; the rectangle looks to the front if their sum is positive.
        material: material of the face.

    Returns:
        One face.
    """
    (y0, y1), (z0, z1) = (np.asarray(v, dtype=float) for v in (y, z))
    low, high = np.broadcast_to(np.asarray(x, dtype=float), 2)
    points = np.array([[low, y0, z0], [low, y1, z0], [high, y1, z1], [high, y0, z1]])
    return [Face(points if low + high > 0 else points[::-1], material)]


def wheels(
    x: Sequence[float], radius: float, length: float, height: float, width: float = 0.5, z: float | None = None
) -> list[Face]:
    """Make wheels with hubs on both sides.

    Args:
        x: centres of the wheels along the unit box.
        radius: radius in metres.
        length: length of the object in metres.
        height: height of the object in metres.
        width: distance of the wheels from the middle, in unit lengths.
        z: height of the centres in metres; by default the radius.

    Returns:
        Two discs, tyre and hub, for each wheel on the right and on the left.
    """
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
    """Replace faces and planes by their indices."""
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
    """Compute the normal of a polygon by Newell's method, which allows repeated points."""
    after = np.roll(points, -1, axis=0)
    return np.cross(points, after).sum(axis=0)


@cache
def mesh_of(name: str) -> Mesh:
    """Return the mesh of a detection class or a piece of scenery, built once in each process.

    Args:
        name: a class such as "car", or a piece of scenery such as "tree"; other names give a plain concrete box.

    Returns:
        The mesh; equal names give the same object.
    """
    return build_mesh(_MESHES[name]() if name in _MESHES else box((-0.5, 0.5), (-0.5, 0.5), (0, 1), Material.CONCRETE))


def _lamps(z: tuple[float, float], front: bool = True, wide: float = 0.28) -> list[Face]:
    """Make tail lamps, a number plate and, with ``front``, head lamps."""
    faces = end((-0.16, 0.16), (z[0] - 0.06, z[0]), -0.5, Material.PLATE)
    for y in ((-0.47, -0.47 + wide * 0.6), (0.47 - wide * 0.6, 0.47)):
        faces += end(y, z, -0.5, Material.TAIL_LAMP)
        faces += end(y, z, 0.5, Material.HEAD_LAMP) if front else []
    return faces


def _car() -> Node:
    body = prism(
        [(-0.5, 0.16), (0.5, 0.16), (0.5, 0.42), (0.47, 0.5), (-0.46, 0.58), (-0.5, 0.5)], (-0.5, 0.5), Material.CAR
    )
    body += end((-0.5, 0.5), (0.16, 0.27), 0.5, Material.BUMPER) + end((-0.5, 0.5), (0.16, 0.27), -0.5, Material.BUMPER)
    body += _lamps((0.36, 0.46)) + wheels((-0.3, 0.31), 0.34, 4.6, 1.7)
    roof = [(-0.42, 0.53), (0.24, 0.53), (0.06, 1.0), (-0.3, 1.0)]
    cabin = prism(roof, (-0.47, 0.47), Material.CAR, inset=0.07)
    for y, lean in ((-0.463, 0.055), (0.463, 0.055)):
        for x0, x1, x2, x3 in ((-0.36, -0.12, -0.12, -0.27), (-0.09, 0.17, 0.05, -0.09)):
            inner = y - np.sign(y) * lean
            window = np.array([[x0, y, 0.58], [x1, y, 0.58], [x2, inner, 0.94], [x3, inner, 0.94]])
            cabin.append(Face(window[::-1] if y > 0 else window, Material.GLASS))
    cabin += end((-0.42, 0.42), (0.57, 0.95), (0.225, 0.08), Material.GLASS)
    cabin += end((-0.41, 0.41), (0.6, 0.94), (-0.402, -0.315), Material.GLASS)
    return Split(2, 0.53, body, cabin)


def _truck() -> Node:
    cab = prism([(0.22, 0.14), (0.5, 0.14), (0.5, 0.5), (0.46, 0.86), (0.22, 0.86)], (-0.48, 0.48), Material.TRUCK_CAB)
    cab += end((-0.42, 0.42), (0.52, 0.8), (0.498, 0.468), Material.GLASS) + end(
        (-0.48, 0.48), (0.14, 0.22), 0.5, Material.BUMPER
    )
    for y in (-0.48, 0.48):
        cab += side((0.28, 0.45), (0.52, 0.78), y, Material.GLASS)
    cab += _lamps((0.26, 0.33)) + wheels((0.36,), 0.5, 7.2, 3.0, 0.48)
    load = box((-0.5, 0.2), (-0.5, 0.5), (0.22, 1.0), Material.TRUCK_CARGO)
    load += end((-0.5, 0.5), (0.14, 0.24), -0.5, Material.BUMPER) + end(
        (-0.01, 0.01), (0.24, 1.0), -0.5, Material.BUMPER
    )
    load += _lamps((0.25, 0.3), front=False) + wheels((-0.34, -0.18), 0.5, 7.2, 3.0)
    return Split(0, 0.21, load, cab)


def _bus() -> Node:
    body = box((-0.5, 0.5), (-0.5, 0.5), (0.1, 1.0), Material.BUS, Material.BUS_BAND)
    for y in (-0.5, 0.5):
        body += side((-0.5, 0.5), (0.34, 0.44), y, Material.BUS_BAND)
        for index in range(6):
            body += side((-0.47 + 0.157 * index, -0.335 + 0.157 * index), (0.48, 0.82), y, Material.GLASS)
    body += end((-0.45, 0.45), (0.4, 0.84), 0.5, Material.GLASS) + end((-0.4, 0.4), (0.52, 0.82), -0.5, Material.GLASS)
    body += end((-0.35, 0.35), (0.87, 0.96), 0.5, Material.BUS_BAND)
    return body + _lamps((0.2, 0.27)) + wheels((-0.3, 0.32), 0.5, 11.0, 3.5)


def _trailer() -> Node:
    body = box((-0.5, 0.5), (-0.5, 0.5), (0.24, 1.0), Material.TRAILER)
    for y in (-0.5, 0.5):
        body += side((-0.5, 0.5), (0.5, 0.66), y, Material.TRAILER_STRIPE)
        body += side((-0.5, 0.5), (0.24, 0.28), y, Material.BUMPER)
    body += end((-0.01, 0.01), (0.28, 1.0), -0.5, Material.BUMPER) + end(
        (-0.5, 0.5), (0.14, 0.28), -0.5, Material.BUMPER
    )
    return body + _lamps((0.29, 0.34), front=False) + wheels((-0.4, -0.28, -0.16), 0.5, 9.0, 3.6)


def _excavator() -> Node:
    tracks = box((-0.42, 0.36), (-0.5, 0.5), (0.0, 0.26), Material.EXCAVATOR_DARK)
    for y in (-0.5, 0.5):
        tracks += side((-0.38, 0.32), (0.06, 0.2), y, Material.BUMPER)
    body = box((-0.5, 0.16), (-0.46, 0.46), (0.27, 0.62), Material.EXCAVATOR)
    body += end((-0.46, 0.46), (0.36, 0.44), -0.5, Material.EXCAVATOR_DARK)
    cab = prism([(-0.16, 0.63), (0.16, 0.63), (0.12, 1.0), (-0.16, 1.0)], (-0.02, 0.44), Material.EXCAVATOR)
    cab += end((0.02, 0.4), (0.66, 0.95), (0.158, 0.126), Material.GLASS)
    cab += side((-0.12, 0.1), (0.66, 0.93), 0.44, Material.GLASS) + side(
        (-0.12, 0.1), (0.66, 0.93), -0.02, Material.GLASS
    )
    boom = prism([(0.17, 0.42), (0.24, 0.36), (0.36, 0.9), (0.3, 0.96)], (-0.3, -0.12), Material.EXCAVATOR)
    arm = prism([(0.365, 0.9), (0.42, 0.3), (0.47, 0.3), (0.43, 0.94)], (-0.3, -0.12), Material.EXCAVATOR)
    bucket = prism([(0.36, 0.02), (0.5, 0.08), (0.5, 0.28), (0.4, 0.28)], (-0.4, -0.02), Material.EXCAVATOR_DARK)
    front = Split(0, 0.362, boom, Split(2, 0.29, bucket, arm))
    return Split(2, 0.265, tracks, Split(0, 0.165, Split(2, 0.625, body, cab), front))


def _rider(body: Material, top: Material) -> Node:
    """Make a person on a saddle: legs, back, arms and head."""
    legs = box((-0.1, 0.1), (-0.3, 0.3), (0.34, 0.56), Material.TROUSERS)
    back = prism([(-0.16, 0.57), (0.04, 0.57), (0.14, 0.82), (-0.04, 0.85)], (-0.32, 0.32), body, inset=0.04)
    arms = prism([(0.165, 0.6), (0.3, 0.58), (0.3, 0.63), (0.165, 0.76)], (-0.4, 0.4), body)
    head = ball((-0.02, 0.13), (-0.2, 0.2), (0.855, 1.0), top, 8)
    return Split(2, 0.565, legs, Split(2, 0.852, Split(0, 0.165, back, arms), head))


def _motorcycle() -> Node:
    frame = prism([(-0.4, 0.2), (0.32, 0.18), (0.36, 0.42), (-0.46, 0.52)], (-0.2, 0.2), Material.MOTORCYCLE)
    frame += wheels((-0.34, 0.34), 0.33, 2.1, 1.6, 0.2)
    frame += end((-0.16, 0.16), (0.4, 0.5), -0.46, Material.TAIL_LAMP)
    fork = prism([(0.365, 0.24), (0.5, 0.24), (0.42, 0.62), (0.37, 0.62)], (-0.14, 0.14), Material.MOTORCYCLE)
    fork += end((-0.12, 0.12), (0.44, 0.58), (0.453, 0.428), Material.HEAD_LAMP)
    return Split(2, 0.525, Split(0, 0.362, frame, fork), _rider(Material.RIDER, Material.HELMET))


def _bicycle() -> Node:
    frame = prism([(-0.3, 0.2), (0.1, 0.16), (0.28, 0.44), (-0.12, 0.48)], (-0.12, 0.12), Material.BICYCLE)
    frame += wheels((-0.3, 0.3), 0.33, 1.75, 1.7, 0.12)
    return Split(2, 0.49, frame, _rider(Material.CYCLIST, Material.HELMET))


def _pedestrian() -> Node:
    legs = Split(
        1,
        0.0,
        prism([(-0.2, 0.0), (0.02, 0.0), (0.12, 0.46), (-0.12, 0.46)], (-0.3, -0.03), Material.TROUSERS),
        prism([(0.0, 0.0), (0.22, 0.0), (0.12, 0.46), (-0.12, 0.46)], (0.03, 0.3), Material.TROUSERS),
    )
    torso = prism([(-0.2, 0.46), (0.2, 0.46), (0.22, 0.8), (-0.2, 0.84)], (-0.36, 0.36), Material.SHIRT, inset=0.06)
    arms = [
        prism([(-0.1, 0.44), (0.1, 0.44), (0.1, 0.8), (-0.1, 0.8)], y, Material.SHIRT)
        for y in ((-0.5, -0.37), (0.37, 0.5))
    ]
    upper = Split(1, -0.365, arms[0], Split(1, 0.365, torso, arms[1]))
    head = Split(
        2,
        0.935,
        ball((-0.2, 0.2), (-0.2, 0.2), (0.845, 0.97), Material.SKIN, 8),
        ball((-0.22, 0.2), (-0.21, 0.21), (0.92, 1.0), Material.HAIR, 8),
    )
    return Split(2, 0.45, legs, Split(2, 0.842, upper, head))


def _cone() -> Node:
    foot = box((-0.5, 0.5), (-0.5, 0.5), (0, 0.07), Material.BUMPER)

    def ring(low: float, high: float, material: Material) -> list[Face]:
        (r0, r1) = (0.36 - 0.28 * level for level in (low, high))
        turn = np.arange(8) / 8 * 2 * np.pi
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        bottom, lid = (
            np.column_stack([circle * r, np.full(8, 0.07 + 0.93 * level)]) for r, level in ((r0, low), (r1, high))
        )
        walls = [Face(np.stack([bottom[i], bottom[i - 7], lid[i - 7], lid[i]]), material) for i in range(8)]
        return [*walls, Face(lid, material)]

    parts = [
        (0.0, 0.35, Material.CONE),
        (0.35, 0.6, Material.CONE_BAND),
        (0.6, 0.78, Material.CONE),
        (0.78, 1.0, Material.CONE),
    ]
    node: Node = ring(*parts[-1])
    for low, high, material in reversed(parts[:-1]):
        node = Split(2, 0.07 + 0.93 * high, ring(low, high, material), node)
    return Split(2, 0.07, foot, node)


def _barrier() -> Node:
    faces = box((-0.5, 0.5), (-0.5, 0.5), (0, 1), Material.BARRIER)
    for x in (-0.5, 0.5):
        for y in (-0.34, 0.0, 0.34):
            faces += end((y - 0.08, y + 0.08), (0.1, 0.92), x, Material.BARRIER_BAND)
    return faces


def _building(wall: Material, floors: int, columns: int, ribbons: bool) -> Node:
    faces = box((-0.5, 0.5), (-0.5, 0.5), (0, 1), wall, Material.ROOF)
    storey = 1 / (floors + 0.4)
    for number, x in ((0, -0.5), (1, 0.5)):
        for floor in range(floors):
            z = ((floor + 0.3) * storey, (floor + 0.8) * storey)
            for column in range(1 if ribbons or not floor else columns):
                lit = (floor * 7 + column * 5 + number * 3) % 4 == 0
                material = Material.SHOP if not floor else Material.LIT_WINDOW if lit else Material.WINDOW
                step = 0.9 / (1 if ribbons or not floor else columns)
                start = -0.45 + column * step + 0.12 * step
                span = (-0.46, 0.46) if ribbons or not floor else (start, start + 0.76 * step)
                faces += end(span, z, x, material)
                faces += side(span, z, x, material)
    return faces


def _tree() -> Node:
    trunk = box((-0.05, 0.05), (-0.05, 0.05), (0, 0.42), Material.TRUNK)
    low = ball((-0.5, 0.5), (-0.5, 0.5), (0.32, 0.78), Material.LEAVES, 8)
    high = ball((-0.38, 0.34), (-0.34, 0.38), (0.6, 1.0), Material.LEAVES, 8)
    return Split(2, 0.36, trunk, Split(2, 0.7, low, high))


def _street_lamp() -> Node:
    pole = box((-0.5, -0.44), (-0.3, 0.3), (0, 0.965), Material.POLE)
    arm = box((-0.5, 0.44), (-0.2, 0.2), (0.975, 1.0), Material.POLE)
    lantern = box((0.14, 0.5), (-0.5, 0.5), (0.945, 0.972), Material.LANTERN, Material.POLE)
    return Split(2, 0.973, Split(0, -0.1, pole, lantern), arm)


_MESHES = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _excavator,
    "motorcycle": _motorcycle,
    "bicycle": _bicycle,
    "pedestrian": _pedestrian,
    "traffic_cone": _cone,
    "barrier": _barrier,
    "house": lambda: _building(Material.BRICK, 3, 4, False),
    "block": lambda: _building(Material.PLASTER, 5, 5, False),
    "office": lambda: _building(Material.CONCRETE, 7, 1, True),
    "tree": _tree,
    "street_lamp": _street_lamp,
}
