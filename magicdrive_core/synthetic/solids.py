"""Draw solids by the painter's algorithm: select visible ones, sort them far to near, colour and fill their faces."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.synthetic.camera import SHIFT, Pixels, PosedCamera
from magicdrive_core.synthetic.light import LAMP_COLOUR, Light, Picture, lamp_light
from magicdrive_core.synthetic.materials import COLOURS, SECOND_COLOURS, SHINING
from magicdrive_core.synthetic.meshes import POINTS, mesh_of

Array = NDArray[np.float64]
Colour = tuple[int, int, int]  # blue, green, red

SMALLEST = 1.2  # pixels below which a face is not drawn
SLACK = 0.05  # metres that two solids may overlap and still be ordered
SMOOTH = 30  # metres within which edges are anti-aliased


@dataclass(frozen=True)
class Solids:
    """N solids in the global frame: objects and scenery."""

    names: list[str]  # of meshes.mesh_of
    centres: Array  # (N, 3) metres, centres of their boxes
    sizes: Array  # (N, 3) w, l, h in metres
    rotations: Array  # (N, 3, 3)
    tints: Array  # (N,) brightness factors, about 1
    ids: NDArray[np.int64]  # (N,) the same at all times: index of the object's track; -1 - index for scenery

    def __len__(self) -> int:
        return len(self.names)

    def select(self, chosen: NDArray[np.int64]) -> Solids:
        """Select solids by index.

        Args:
            chosen: (M,) indices, in the wanted order.

        Returns:
            M solids.
        """
        return Solids(
            [self.names[index] for index in chosen],
            self.centres[chosen],
            self.sizes[chosen],
            self.rotations[chosen],
            self.tints[chosen],
            self.ids[chosen],
        )

    def joined(self, other: Solids) -> Solids:
        """Append other solids.

        Args:
            other: the other solids.

        Returns:
            These solids, then the others.
        """
        return Solids(
            self.names + other.names,
            np.concatenate([self.centres, other.centres]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.rotations, other.rotations]),
            np.concatenate([self.tints, other.tints]),
            np.concatenate([self.ids, other.ids]),
        )

    @property
    def footprints(self) -> Array:
        """Corners of the boxes on the ground, counter-clockwise.

        Returns:
            (N, 4, 2) metres in the global frame.
        """
        corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
        extent = self.sizes[:, None, [1, 0]] * corners
        return self.centres[:, None, :2] + extent @ np.swapaxes(self.rotations[:, :2, :2], 1, 2)


@dataclass(frozen=True)
class Faces:
    """F flat faces in drawing order, far to near."""

    points: Array  # (F, 8, 3) in the camera frame
    colours: NDArray[np.int64]  # (F, 3) blue, green, red
    shining: NDArray[np.bool_]  # (F,) whether the face emits light
    away: Array  # (F,) metres from the camera to the centre of the solid
    owners: NDArray[np.int64]  # (F,) index of the solid


def visible(solids: Solids, camera: PosedCamera, reach: float) -> Solids:
    """Select the solids that can be in the picture, in drawing order.

    Args:
        solids: all solids.
        camera: the camera.
        reach: metres beyond which solids are left out.

    Returns:
        The selected solids, far to near, see ``far_to_near``.
    """
    if not len(solids):
        return solids
    middle = camera.from_global(solids.centres)
    radius = np.linalg.norm(solids.sizes, axis=1) / 2
    k = camera.intrinsics
    left, right = k[0, 2] / k[0, 0], (2 * 800 - k[0, 2]) / k[0, 0]
    margin_left, margin_right = radius * np.hypot(1, left), radius * np.hypot(1, right)
    inside = (middle[:, 2] > -radius) & (np.linalg.norm(middle, axis=1) - radius < reach)
    inside &= middle[:, 0] > -left * middle[:, 2] - margin_left
    inside &= middle[:, 0] < right * middle[:, 2] + margin_right
    chosen = solids.select(np.flatnonzero(inside))
    return chosen.select(far_to_near(chosen, camera.eye[:2]))


def far_to_near(solids: Solids, eye: Array) -> NDArray[np.int64]:
    """Sort solids so that each comes after all that it can occlude.

    If all of one upright box is on the outer side of an edge of another, the box on the eye's side of that edge is in
    front. Boxes that overlap are sorted by distance.

    Args:
        solids: the solids.
        eye: (2,) position of the camera on the ground.

    Returns:
        (N,) indices in drawing order.
    """
    count = len(solids)
    corners = solids.footprints
    start, step = corners, np.roll(corners, -1, axis=1) - corners
    outward = np.stack([step[..., 1], -step[..., 0]], axis=-1)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    level = (outward * start).sum(axis=-1)  # (N, 4)
    others = np.einsum("nkc,mpc->nmkp", outward, corners).min(axis=-1) - level[:, None]  # (N, M, 4)
    beyond = others >= -SLACK  # all of m is outside edge k of n
    outside = (outward @ eye - level) >= 0  # (N, 4) so is the eye
    in_front = (beyond & outside[:, None]).any(axis=-1)  # m may occlude n, and n never m
    behind = (beyond & ~outside[:, None]).any(axis=-1)  # n may occlude m, and m never n
    before = in_front | behind.T  # n can be drawn before m
    must = before & ~before.T
    np.fill_diagonal(must, False)
    distance = np.round(np.linalg.norm(solids.centres[:, :2] - eye, axis=1), 3)
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


def faces_of(solids: Solids, camera: PosedCamera, light: Light, lamps: Array) -> Faces:
    """Collect the faces that look at the camera, with their colours.

    Args:
        solids: solids in drawing order, see ``visible``.
        camera: the camera.
        light: lighting of the scene.
        lamps: (M, 2) positions of street lamps, which light solids at night.

    Returns:
        The faces in drawing order, shaded, lit and hazed.
    """
    parts = [(np.empty((0, POINTS, 3)), np.empty((0, 3)), np.empty(0, bool), np.empty(0, int), np.empty(0, int))]
    names = np.array(solids.names)
    bright = _brightness(solids, camera, light, lamps)
    for name in sorted(set(solids.names)):
        members = np.flatnonzero(names == name)
        mesh = mesh_of(name)
        scale = solids.sizes[members][:, [1, 0, 2]]  # x is along the length
        turn = solids.rotations[members]
        base = solids.centres[members] - turn[..., 2] * scale[:, 2:] / 2
        eye = np.einsum("nji,nj->ni", turn, camera.eye - base) / scale
        towards = ((eye[:, None] - mesh.faces[None, :, 0]) * mesh.normals).sum(axis=-1) > 0
        rank = np.empty((len(members), mesh.faces.shape[0]), np.int64)
        np.put_along_axis(rank, mesh.order(eye), np.arange(rank.shape[1])[None], axis=1)
        which, face = np.nonzero(towards)
        points = (mesh.faces[face] * scale[which, None]) @ np.swapaxes(turn, 1, 2)[which] + base[which, None]
        normal = np.einsum("fij,fj->fi", turn[which], mesh.normals[face] / scale[which])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        owner = members[which]
        material = mesh.materials[face]
        colours = SECOND_COLOURS if light.second_town else COLOURS
        colour = colours[material] * solids.tints[owner, None] * _shading(normal, light)[:, None] * bright[owner]
        glows = (SHINING[material, 0] >= 0) & light.shining
        colour[glows] = SHINING[material[glows]]
        parts.append((points, colour, glows, owner, rank[which, face]))
    points, colour, glows, owner, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
    away = np.linalg.norm(solids.centres - camera.eye, axis=1)[owner]
    clear = np.exp(-away / light.haze)[:, None]
    clear = np.where(glows[:, None], np.sqrt(clear), clear)  # lamps are visible through haze
    haze = np.array(light.horizon)
    colour = np.clip(np.rint(haze + (colour - haze) * clear), 0, 255).astype(np.int64)
    order = np.lexsort((rank, owner))
    return Faces(camera.from_global(points[order]), colour[order, ::-1], glows[order], away[order], owner[order])


def fill(picture: Picture, faces: Faces, camera: PosedCamera) -> list[tuple[Pixels, Colour, float]]:
    """Fill faces into a picture, in place.

    Args:
        picture: (900, 1600, 3) blue, green, red.
        faces: the faces in drawing order; edges of those nearer than ``SMOOTH`` are anti-aliased.
        camera: the camera.

    Returns:
        Outline, colour and distance in metres of each shining face.
    """
    lamps = []
    for index, outline in enumerate(camera.outlines(faces.points, SMALLEST)):
        if outline is None:
            continue
        blue, green, red = faces.colours[index].tolist()
        smooth = cv2.LINE_AA if faces.away[index] < SMOOTH else cv2.LINE_8
        cv2.fillConvexPoly(picture, outline, (blue, green, red), smooth, SHIFT)
        if faces.shining[index]:
            lamps.append((outline, (blue, green, red), float(faces.away[index])))
    return lamps


def mirrored(faces: Faces, camera: PosedCamera, reach: float) -> Faces:
    """Mirror faces in the ground plane.

    Args:
        faces: the faces, in the camera frame.
        camera: the camera.
        reach: metres from the camera beyond which faces are left out.

    Returns:
        The mirrored faces, in the same order.
    """
    near = faces.away < reach
    up = camera.ego_to_global[:3, 2] @ camera.camera_to_global[:3, :3]  # in the camera frame
    points = faces.points[near]
    points = points - 2 * (points @ up + camera.height)[..., None] * up
    return Faces(points, faces.colours[near], faces.shining[near], faces.away[near], faces.owners[near])


def _shading(normals: Array, light: Light) -> Array:
    """Compute the brightness (F,) of faces from their normals (F, 3)."""
    sky = 0.86 + 0.14 * normals[:, 2]  # more light from above than from below
    side = 0.05 * normals[:, 0] - 0.04 * normals[:, 1]  # makes walls distinguishable without sun
    return light.ambient * (sky + side) + light.sun * np.maximum(normals @ np.array(light.sun_from), 0)


def _brightness(solids: Solids, camera: PosedCamera, light: Light, lamps: Array) -> Array:
    """Compute the colour factors (N, 3) of solids: lamp light at night, otherwise 1."""
    if not light.dark:
        return np.ones((len(solids), 3))
    level = lamp_light(solids.centres[:, :2], camera, lamps)
    # High solids are above the dipped beams.
    level = np.where(solids.sizes[:, 2] > 5, np.minimum(level, 0.34), level)
    return level[:, None] * LAMP_COLOUR
