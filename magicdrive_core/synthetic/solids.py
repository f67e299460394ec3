"""Drawing solid things: which are seen, in which order, in which colours."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.synthetic.lens import SHIFT, Lens, Pixels
from magicdrive_core.synthetic.light import LAMP_COLOUR, Light, Picture, lamp_light
from magicdrive_core.synthetic.materials import COLOURS, SHINING
from magicdrive_core.synthetic.meshes import POINTS, shape

Array = NDArray[np.float64]
Colour = tuple[int, int, int]  # blue, green, red

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
class Faces:
    """Flat faces in drawing order, far to near. F of them."""

    points: Array  # (F, 8, 3) in the camera frame
    colours: NDArray[np.int64]  # (F, 3) blue, green, red
    shining: NDArray[np.bool_]  # (F,)
    away: Array  # (F,) metres from the eye to the thing's middle
    owners: NDArray[np.int64]  # (F,) index of the thing


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


def faces_of(things: Things, lens: Lens, light: Light, lamps: Array) -> Faces:
    """The faces that are turned to the eye, in their colours.

    Args:
        things: in drawing order (``seen``).
        lens: the camera.
        light: of the scene.
        lamps: (M, 2) street lamps, which light things at night.
    """
    parts = [(np.empty((0, POINTS, 3)), np.empty((0, 3)), np.empty(0, bool), np.empty(0, int), np.empty(0, int))]
    names = np.array(things.names)
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
        points = (form.faces[face] * scale[which, None]) @ np.swapaxes(turn, 1, 2)[which] + base[which, None]
        normal = np.einsum("fij,fj->fi", turn[which], form.normals[face] / scale[which])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        owner = members[which]
        material = form.materials[face]
        colour = COLOURS[material] * things.tints[owner, None] * _shading(normal, light)[:, None] * bright[owner]
        glows = (SHINING[material, 0] >= 0) & light.shining
        colour[glows] = SHINING[material[glows]]
        parts.append((points, colour, glows, owner, rank[which, face]))
    points, colour, glows, owner, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
    away = np.linalg.norm(things.centres - lens.eye, axis=1)[owner]
    clear = np.exp(-away / light.haze)[:, None]
    clear = np.where(glows[:, None], np.sqrt(clear), clear)  # lamps shine through
    haze = np.array(light.horizon)
    colour = np.clip(np.rint(haze + (colour - haze) * clear), 0, 255).astype(np.int64)
    order = np.lexsort((rank, owner))
    return Faces(lens.camera(points[order]), colour[order, ::-1], glows[order], away[order], owner[order])


def fill(picture: Picture, faces: Faces, lens: Lens) -> list[tuple[Pixels, Colour, float]]:
    """Fills faces into a picture; returns outline, colour and distance of those that shine."""
    lamps = []
    for index, outline in enumerate(lens.outlines(faces.points, SMALLEST)):
        if outline is None:
            continue
        blue, green, red = faces.colours[index].tolist()
        smooth = cv2.LINE_AA if faces.away[index] < SMOOTH else cv2.LINE_8
        cv2.fillConvexPoly(picture, outline, (blue, green, red), smooth, SHIFT)
        if faces.shining[index]:
            lamps.append((outline, (blue, green, red), float(faces.away[index])))
    return lamps


def mirrored(faces: Faces, lens: Lens, reach: float) -> Faces:
    """The mirror images in the ground of faces within ``reach`` metres."""
    near = faces.away < reach
    up = lens.ego_to_global[:3, 2] @ lens.camera_to_global[:3, :3]  # in the camera frame
    points = faces.points[near]
    points = points - 2 * (points @ up + lens.height)[..., None] * up
    return Faces(points, faces.colours[near], faces.shining[near], faces.away[near], faces.owners[near])


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
