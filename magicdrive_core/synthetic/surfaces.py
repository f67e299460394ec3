"""The surface that each pixel of a rendered picture shows, and where another picture shows the same point.

The same ground and solids as in ``render.draw`` are drawn in the same order, with indices of faces in place of colours.
Every pixel is then a point of the sky, of the ground plane or of a plane face of a solid, so its place in another
picture follows exactly: from frame to frame (optical flow) as well as from camera to camera. Objects take their own
motion along; points that the other picture does not show are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, Framing, project
from magicdrive_core.synthetic.camera import NEAR, SHIFT, PosedCamera
from magicdrive_core.synthetic.ground import MAP_RANGE, Label, Labels, paint
from magicdrive_core.synthetic.light import DAY
from magicdrive_core.synthetic.render import StaticWorld, on_ground
from magicdrive_core.synthetic.sky import paint_sky
from magicdrive_core.synthetic.solids import SMALLEST, Solids, faces_of, visible

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

GROUND, SKY, OUTSIDE = 1 << 30, (1 << 30) + 1, (1 << 30) + 2  # beside the ids of solids
NONE = -1  # no face
DEPTH_SLACK = 0.1, 0.01  # metres, and share of the depth, by which the same point may differ in two pictures


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of one picture of 1600x900 pixels."""

    camera: PosedCamera
    labels: Labels  # (900, 1600) of sky and ground, also behind solids
    faces: NDArray[np.int32]  # (900, 1600) index of the face, NONE where there is sky or ground
    planes: Array  # (F, 3): a point p of the camera frame is in the plane of face f where planes[f] @ p = 1
    owners: Ids  # (F,) index in ``solids`` of each face's solid
    solids: Solids  # those that can be in the picture

    def seen_at(self, pixels: Array) -> Ids:
        """Look up what the picture shows.

        Args:
            pixels: (..., 2) column and row; pixel centres are at integer + 0.5.

        Returns:
            (...): the id of a solid, GROUND, SKY or OUTSIDE.
        """
        columns, rows, inside = _indices(pixels)
        face = self.faces[rows, columns]
        out = np.where(self.labels[rows, columns] < Label.LAND, SKY, GROUND)
        solid = face != NONE
        out[solid] = self.solids.ids[self.owners[face[solid]]]
        return np.where(inside, out, OUTSIDE)

    def rays(self, pixels: Array) -> Array:
        """Compute viewing rays.

        Args:
            pixels: (..., 2) column and row; pixel centres are at integer + 0.5.

        Returns:
            (..., 3) in the camera frame, of depth 1.
        """
        (fx, _, cx), (_, fy, cy) = self.camera.intrinsics[:2]
        return np.stack([(pixels[..., 0] - cx) / fx, (pixels[..., 1] - cy) / fy, np.ones(pixels.shape[:-1])], axis=-1)

    def depths(self, pixels: Array) -> Array:
        """Compute the depth of the face that each pixel shows.

        Args:
            pixels: (..., 2) column and row; pixel centres are at integer + 0.5.

        Returns:
            (...) metres along the optical axis; infinite where no face is shown.
        """
        columns, rows, inside = _indices(pixels)
        face = np.where(inside, self.faces[rows, columns], NONE)
        shown = face != NONE
        out = np.full(face.shape, np.inf)
        out[shown] = 1 / (self.planes[face[shown]] * self.rays(pixels)[shown]).sum(axis=-1)
        return out


@dataclass(frozen=True)
class Correspondence:
    """Where another picture shows what the pixels of a picture show.

    Attributes:
        at: float32 (H, W, 2) column and row in the other picture, in pixels of the video with centres at integers, as
            ``cv2.remap`` takes them.
        valid: bool (H, W): both pictures show this point, and neither pixel mixes it with another surface.
    """

    at: NDArray[np.float32]
    valid: NDArray[np.bool_]


def draw_surfaces(camera: PosedCamera, world: StaticWorld, movers: Solids) -> Surfaces:
    """Draw the surfaces of a picture.

    Args:
        camera: the camera.
        world: map and scenery.
        movers: the annotated objects at the time of the picture.

    Returns:
        The surfaces, of the same polygons in the same order as in ``render.draw``.
    """
    labels = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH), np.uint8)
    paint_sky(labels, camera)
    paint(labels, world.ground, camera)
    solids = visible(movers.joined(on_ground(world.scenery, camera)), camera, MAP_RANGE)
    faces = faces_of(solids, camera, DAY, np.empty((0, 2)))  # no light changes their order
    shown = np.full((PICTURE_HEIGHT, PICTURE_WIDTH), NONE, np.int32)
    for index, outline in enumerate(camera.outlines(faces.points, SMALLEST)):
        if outline is not None:
            cv2.fillConvexPoly(shown, outline, (index,), cv2.LINE_8, SHIFT)  # indices cannot be mixed: no anti-aliasing
    after = np.roll(faces.points, -1, axis=1)
    normals = np.cross(faces.points, after).sum(axis=1)  # Newell's method, for repeated points
    planes = normals / (normals * faces.points[:, 0]).sum(axis=1, keepdims=True)
    return Surfaces(camera, labels, shown, planes, faces.owners, solids)


def correspond(source: Surfaces, target: Surfaces, framing: Framing) -> Correspondence:
    """Find where ``target`` shows the points that the pixels of ``source`` show.

    Args:
        source: surfaces of a picture.
        target: surfaces of another picture of the same scene: of another time, another camera or both.
        framing: size and crop of the videos of both.

    Returns:
        The correspondence of each pixel of a video frame (H, W).
    """
    pixels, scale, top = middles(framing), _scale(framing), np.array([0, framing.crop])
    ids = source.seen_at(pixels)
    points = _in_target(source, target, pixels, ids)
    there, depth = project(points, target.camera.intrinsics)
    before = depth > NEAR
    there = np.where(before[..., None], there, -1.0)  # outside the picture
    near, share = DEPTH_SLACK
    away = np.abs(target.depths(there) - depth)
    solid = ids < GROUND
    away[~solid] = 0  # the ground and the sky are where a pixel shows them
    valid = before & (away <= near + share * depth)
    for offset in product((-0.5, 0.0, 0.5), repeat=2):  # corners, sides and middle of the video's pixel
        within = np.array(offset) / scale * 0.98
        valid &= (source.seen_at(pixels + within) == ids) & (target.seen_at(there + within) == ids)
    at = there * scale - 0.5 - top
    valid &= (at >= 0).all(axis=-1) & (at[..., 0] <= framing.width - 1) & (at[..., 1] <= framing.height - 1)
    return Correspondence(at.astype(np.float32), valid)


def middles(framing: Framing) -> Array:
    """Return the middle of each pixel of a video frame in its picture.

    Args:
        framing: size and crop of the video.

    Returns:
        (H, W, 2) column and row of the picture of 1600x900 pixels; its pixel centres are at integer + 0.5.
    """
    rows, columns = np.mgrid[: framing.height, : framing.width]
    return (np.stack([columns, rows], axis=-1) + 0.5 + np.array([0, framing.crop])) / _scale(framing)


def _scale(framing: Framing) -> Array:
    """Return the video's pixels for each pixel of the picture, along columns and rows: (2,)."""
    return np.array([framing.width / PICTURE_WIDTH, framing.resized_height / PICTURE_HEIGHT])


def _indices(pixels: Array) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    """Round pixels to columns and rows of the picture, and tell which are inside it."""
    whole = np.floor(pixels).astype(np.int64)
    columns, rows = whole[..., 0], whole[..., 1]
    inside = (columns >= 0) & (columns < PICTURE_WIDTH) & (rows >= 0) & (rows < PICTURE_HEIGHT)
    return columns.clip(0, PICTURE_WIDTH - 1), rows.clip(0, PICTURE_HEIGHT - 1), inside


def _in_target(source: Surfaces, target: Surfaces, pixels: Array, ids: Ids) -> Array:
    """Compute the points (H, W, 3) that pixels of the source show, in the target's camera frame at the target's time.

    Points of the sky are far away in their direction, which no camera's position changes; points of solids that the
    target lacks are at its camera.
    """
    rays = source.rays(pixels)
    turned = rays @ source.camera.camera_to_global[:3, :3].T
    out = np.zeros_like(rays)
    sky = ids == SKY
    out[sky] = (
        turned[sky] @ target.camera.camera_to_global[:3, :3] * (2 * NEAR / np.linalg.norm(rays[sky], axis=1))[:, None]
    )
    ground = ids == GROUND
    out[ground] = target.camera.from_ground(_on_ground_plane(source.camera, turned[ground]))
    depths = source.depths(pixels)
    here, there = ({int(key): row for row, key in enumerate(s.solids.ids)} for s in (source, target))
    for key in set(np.unique(ids).tolist()) & here.keys() & there.keys():
        mine, old, new = ids == key, here[key], there[key]
        seen = source.camera.eye + turned[mine] * depths[mine][:, None]
        local = (seen - source.solids.centres[old]) @ source.solids.rotations[old]
        moved = local @ target.solids.rotations[new].T + target.solids.centres[new]
        out[mine] = target.camera.from_global(moved)
    return out


def _on_ground_plane(camera: PosedCamera, rays: Array) -> Array:
    """Intersect rays (N, 3) of the global frame with the ground plane: (N, 2) x and y in the global frame."""
    drop = -rays @ camera.ego_to_global[:3, 2]
    return camera.eye[:2] + rays[:, :2] * (camera.height / drop)[:, None]
