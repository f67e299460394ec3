"""One picture: sky, ground, shadows, mirror images on wet roads, things, halos of lamps."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.synthetic.glow import add_halos
from magicdrive_core.data.synthetic.ground import SEEN, SHADOW, WET, Ground, Labels, paint, prepare, shade
from magicdrive_core.data.synthetic.lens import Lens
from magicdrive_core.data.synthetic.light import Light, Picture, colourise, darken
from magicdrive_core.data.synthetic.maps import MapShapes
from magicdrive_core.data.synthetic.objects import Faces, Things, faces_of, fill, mirrored, seen
from magicdrive_core.data.synthetic.scenery import Scenery
from magicdrive_core.data.synthetic.sky import paint_sky
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH

Array = NDArray[np.float64]

QUALITY = 88  # of JPEG
LIT = 70.0  # metres within which street lamps light the ground
MIRRORED = 45.0  # metres within which things are mirrored in the wet
MIRROR_SHARE = 0.42  # of a mirror image in the road's colour


@dataclass(frozen=True)
class Place:
    """A location, prepared for drawing."""

    ground: Ground
    scenery: Things  # standing on z = 0
    lamps: Array  # (M, 2) street lamps


def prepare_place(shapes: MapShapes, scenery: Scenery) -> Place:
    """Everything that a map alone decides."""
    boxes = scenery.boxes
    c, s, zero = np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))
    rotations = np.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], axis=1).reshape(-1, 3, 3)
    things = Things(scenery.names, boxes[:, :3], boxes[:, 3:6], rotations, np.ones(len(boxes)))
    lamps = boxes[[name == "street_lamp" for name in scenery.names], :2]
    return Place(prepare(shapes), things, lamps.reshape(-1, 2))


def draw(lens: Lens, light: Light, place: Place, movers: Things) -> Picture:
    """Draws what a camera sees: (900, 1600, 3) blue, green, red.

    Args:
        lens: the camera and the ground plane under the car.
        light: of the scene.
        place: map and scenery.
        movers: the annotated objects at the time of the picture.
    """
    labels = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH), np.uint8)
    paint_sky(labels, lens)
    paint(labels, place.ground, lens)
    things = seen(movers.joined(standing(place.scenery, lens)), lens, SEEN)
    shade(labels, _shadows(things, light), lens)
    picture = colourise(labels, lens, light)
    lamps = place.lamps[np.linalg.norm(place.lamps - lens.eye[:2], axis=1) < LIT]
    if light.dark:
        darken(picture, lens, lamps)
    faces = faces_of(things, lens, light, lamps)
    if light.wet:
        _mirror(picture, labels, faces, lens)
    shining = fill(picture, faces, lens)
    if light.shining:
        add_halos(picture, shining, 60 if light.dark else 22)
    return picture


def encode(picture: Picture) -> bytes:
    """The picture as JPEG."""
    done, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise MagicDriveError("a picture could not be encoded as JPEG")
    return jpeg.tobytes()


def standing(scenery: Things, lens: Lens) -> Things:
    """Scenery near the camera, standing on the ground plane."""
    near = np.flatnonzero(np.linalg.norm(scenery.centres[:, :2] - lens.eye[:2], axis=1) < SEEN)
    chosen = scenery.taken(near)
    floor = np.column_stack([chosen.centres[:, :2], np.ones(len(near))]) @ lens.lift[2]
    centres = np.column_stack([chosen.centres[:, :2], floor + chosen.sizes[:, 2] / 2])
    return Things(chosen.names, centres, chosen.sizes, chosen.rotations, chosen.tints)


def _shadows(things: Things, light: Light) -> Array:
    """Quadrilaterals (Q, 4, 2) on the ground: footprints; in the sun also tops, and what the sides sweep over."""
    foot = things.footprints
    if not light.sun:
        return foot
    top = foot + (things.sizes[:, 2, None] * light.shadow_step)[:, None]
    after, top_after = np.roll(foot, -1, axis=1), np.roll(top, -1, axis=1)
    sides = np.stack([foot, after, top_after, top], axis=2)  # (N, 4, 4, 2)
    return np.concatenate([foot[:, None], top[:, None], sides], axis=1).reshape(-1, 4, 2)


def _mirror(picture: Picture, labels: Labels, faces: Faces, lens: Lens) -> None:
    """Mirrors faces in the wet road, and only there."""
    first = int(np.clip(lens.horizon - 40, 0, PICTURE_HEIGHT - 1))  # the horizon may lean
    image = picture.copy()
    fill(image, mirrored(faces, lens, MIRRORED), lens)
    ground = picture[first:]
    mixed = cv2.addWeighted(image[first:], MIRROR_SHARE, ground, 1 - MIRROR_SHARE, 0)
    wet = np.isin(np.arange(256) & ~SHADOW, WET).astype(np.uint8)
    cv2.copyTo(mixed, cv2.LUT(labels[first:], wet), ground)
