"""Drawing solid things: which are seen, in which order, in which colours."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.synthetic.lens import SHIFT, Lens, Pixels
from magicdrive_core.data.synthetic.light import LAMP_COLOUR, Light, Picture, lamp_light
from magicdrive_core.data.synthetic.materials import COLOURS, SHINING
from magicdrive_core.data.synthetic.meshes import POINTS
from magicdrive_core.data.synthetic.shapes import shape

Array = NDArray[np.float64]

SMALLEST = 1.2  # pixels of a face that is drawn
SLACK = 0.05  # metres by which two things may overlap and still be told apart
SMOOTH = 30  # metres within which edges are drawn smoothly


@dataclass(frozen=True)
class Things:
    """Solid things in the global frame. N of them."""

    names: list[str]  # of shapes.shape
    centres: Array  # (N, 3) metres, middle of the box
    sizes: Array  # (N, 3) w, l, h in metres
    rotations: Array  # (N, 3, 3)
    tints: Array  # (N,) brightness of the colours, about 1

    def __len__(self) -> int:
        return len(self.names)

    def taken(self, chosen: NDArray[np.int64]) -> Things:
        """Some of the things."""
        names = [self.names[index] for index in chosen]
        return Things(names, self.centres[chosen], self.sizes[chosen], self.rotations[chosen], self.tints[chosen])

    def joined(self, other: Things) -> Things:
        """These and the others."""
        return Things(
            self.names + other.names,
            np.concatenate([self.centres, other.centres]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.rotations, other.rotations]),
            np.concatenate([self.tints, other.tints]),
        )

    @property
    def footprints(self) -> Array:
        """Corners (N, 4, 2) on the ground, counter-clockwise."""
        corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
        extent = self.sizes[:, None, [1, 0]] * corners
        return self.centres[:, None, :2] + extent @ np.swapaxes(self.rotations[:, :2, :2], 1, 2)


@dataclass(frozen=True)
class Painted:
    """Faces in drawing order, far to near."""

    outlines: list[Pixels]
    colours: list[tuple[int, int, int]]  # blue, green, red
    smooth: list[bool]
    lamps: list[tuple[Pixels, tuple[int, int, int], float]]  # shining faces: outline, colour, metres away


def seen(things: Things, lens: Lens, reach: float) -> Things:
    """The things that may be in the picture, far to near so that nothing is drawn over what hides it."""
    if not len(things):
        return things
    middle = lens.camera(things.centres)
    radius = np.linalg.norm(things.sizes, axis=1) / 2
    k = lens.intrinsics
    left, right = k[0, 2] / k[0, 0], (2 * 800 - k[0, 2]) / k[0, 0]
    margin_left, margin_right = radius * np.hypot(1, left), radius * np.hypot(1, right)
    inside = (middle[:, 2] > -radius) & (np.linalg.norm(middle, axis=1) - radius < reach)
    inside &= middle[:, 0] > -left * middle[:, 2] - margin_left
    inside &= middle[:, 0] < right * middle[:, 2] + margin_right
    chosen = things.taken(np.flatnonzero(inside))
    return chosen.taken(far_to_near(chosen, lens.eye[:2]))


def far_to_near(things: Things, eye: Array) -> NDArray[np.int64]:
    """An order in which each thing comes after all that it can hide.

    Of two upright boxes, an edge of one that has the other on its outer side tells which is in front: the one on the
    eye's side of it. Boxes that overlap are ordered by their distance.
    """
    count = len(things)
    corners = things.footprints
    start, step = corners, np.roll(corners, -1, axis=1) - corners
    outward = np.stack([step[..., 1], -step[..., 0]], axis=-1)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    level = (outward * start).sum(axis=-1)  # (N, 4)
    others = np.einsum("nkc,mpc->nmkp", outward, corners).min(axis=-1) - level[:, None]  # (N, M, 4)
    beyond = others >= -SLACK  # all of m lies outside of edge k of n
    outside = (outward @ eye - level) >= 0  # (N, 4) the eye does too
    in_front = (beyond & outside[:, None]).any(axis=-1)  # m may hide n, and n never m
    behind = (beyond & ~outside[:, None]).any(axis=-1)  # n may hide m, and m never n
    before = in_front | behind.T  # n can be drawn before m
    must = before & ~before.T
    np.fill_diagonal(must, False)
    distance = np.round(np.linalg.norm(things.centres[:, :2] - eye, axis=1), 3)
    waiting = must.sum(axis=0)
    left = np.ones(count, bool)
    order = []
    for _ in range(count):
        ready = left & (waiting == 0)
        candidates = np.flatnonzero(ready if ready.any() else left)
        chosen = candidates[np.argmax(distance[candidates])]
        order.append(chosen)
        left[chosen] = False
        waiting -= must[chosen]
    return np.array(order, dtype=np.int64)


def paint_things(things: Things, lens: Lens, light: Light, lamps: Array, mirrored: bool = False) -> Painted:
    """Faces of things, which come in drawing order (``seen``).

    Args:
        things: what to draw.
        lens: the camera.
        light: of the scene.
        lamps: (M, 2) street lamps, which light things at night.
        mirrored: draw the things' mirror images in the ground instead.
    """
    faces, colours, shining, away = _faces(things, lens, light, lamps)
    if mirrored:
        up = lens.ego_to_global[:3, 2] @ lens.camera_to_global[:3, :3]  # in the camera frame
        faces = faces - 2 * ((faces @ up + lens.height)[..., None]) * up
    out = Painted([], [], [], [])
    smallest = SMALLEST if not mirrored else 4.0
    for index, outline in enumerate(lens.outlines(faces, smallest)):
        if outline is None:
            continue
        colour = (int(colours[index, 2]), int(colours[index, 1]), int(colours[index, 0]))
        out.outlines.append(outline)
        out.colours.append(colour)
        out.smooth.append(bool(away[index] < SMOOTH))
        if shining[index]:
            out.lamps.append((outline, colour, float(away[index])))
    return out


def fill(picture: Picture, painted: Painted) -> None:
    """Fills the faces into a picture."""
    for outline, colour, smooth in zip(painted.outlines, painted.colours, painted.smooth, strict=True):
        cv2.fillConvexPoly(picture, outline, colour, cv2.LINE_AA if smooth else cv2.LINE_8, SHIFT)


def _faces(things: Things, lens: Lens, light: Light, lamps: Array) -> tuple[Array, Array, NDArray[np.bool_], Array]:
    """Faces turned to the eye in drawing order: points (F, 8, 3) in the camera frame, colours, shining or not, metres."""
    parts = []
    names = np.array(things.names)
    away = np.linalg.norm(things.centres - lens.eye, axis=1)
    bright = _brightness(things, lens, light, lamps)
    for name in sorted(set(things.names)):
        members = np.flatnonzero(names == name)
        form = shape(name)
        scale = things.sizes[members][:, [1, 0, 2]]  # x is along the length
        turn = things.rotations[members]
        base = things.centres[members] - turn[..., 2] * scale[:, 2:] / 2
        eye = np.einsum("nji,nj->ni", turn, lens.eye - base) / scale
        towards = ((eye[:, None] - form.faces[None, :, 0]) * form.normals).sum(axis=-1) > 0
        rank = np.empty((len(members), form.faces.shape[0]), np.int64)
        np.put_along_axis(rank, form.order(eye), np.arange(rank.shape[1])[None], axis=1)
        which, face = np.nonzero(towards)
        local = form.faces[face] * scale[which, None]
        points = np.einsum("fij,fkj->fki", turn[which], local) + base[which, None]
        normal = np.einsum("fij,fj->fi", turn[which], form.normals[face] / scale[which])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        owner = members[which]
        material = form.materials[face]
        colour = COLOURS[material] * things.tints[owner, None] * _shading(normal, light)[:, None] * bright[owner]
        glows = (SHINING[material, 0] >= 0) & light.shining
        colour[glows] = SHINING[material[glows]]
        parts.append((points, colour, glows, owner, rank[which, face]))
    if not parts:
        return np.empty((0, POINTS, 3)), np.empty((0, 3)), np.empty(0, bool), np.empty(0)
    points, colour, glows, owner, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
    clear = np.exp(-away[owner] / light.haze)[:, None]
    clear = np.where(glows[:, None], np.sqrt(clear), clear)
    haze = np.array(light.horizon)
    colour = np.clip(np.rint(haze + (colour - haze) * clear), 0, 255)
    order = np.lexsort((rank, owner))
    return lens.camera(points[order]), colour[order], glows[order], away[owner[order]]


def _shading(normals: Array, light: Light) -> Array:
    """Share of its colour that a face with a normal (F, 3) shows."""
    sky = 0.86 + 0.14 * normals[:, 2]  # from above comes more than from below
    side = 0.05 * normals[:, 0] - 0.04 * normals[:, 1]  # tells walls apart where no sun does
    return light.ambient * (sky + side) + light.sun * np.maximum(normals @ np.array(light.sun_from), 0)


def _brightness(things: Things, lens: Lens, light: Light, lamps: Array) -> Array:
    """Factor (N, 3) of each thing's colours: lamp light at night."""
    if not light.dark:
        return np.ones((len(things), 3))
    level = lamp_light(things.centres[:, :2], lens, lamps)
    # High things stand above the beams of dipped head lamps.
    level = np.where(things.sizes[:, 2] > 5, np.minimum(level, 0.34), level)
    return level[:, None] * LAMP_COLOUR
