"""What every pixel of a drawn picture shows, as one of a few regions: drawn again in flat colours."""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, Framing
from magicdrive_core.synthetic.footage import CLASSES, Footage, Shot, read_footage
from magicdrive_core.synthetic.ground import SEEN, Label, paint, read_shapes
from magicdrive_core.synthetic.lens import Lens
from magicdrive_core.synthetic.light import light_of
from magicdrive_core.synthetic.render import Place, prepare_place, standing
from magicdrive_core.synthetic.scenery import scenery_of
from magicdrive_core.synthetic.sky import paint_sky
from magicdrive_core.synthetic.solids import SMOOTH, Things, faces_of, fill, seen

Regions = NDArray[np.uint8]  # of Region


class Region(IntEnum):
    """Kinds of surface that a picture is told apart into."""

    SKY = 0
    ROAD = 1
    MARK = 2  # crossings, stop lines and dividers
    WALKWAY = 3
    LAND = 4
    SCENERY = 5  # buildings, trees, lamps, the far skyline: in no table, so that no condition tells of them
    VEHICLE = 6  # cars, trucks, buses, trailers, diggers
    SMALL = 7  # people, two-wheelers, cones, barriers


_OF_LABEL = {
    Label.SKY: Region.SKY,
    Label.CLOUD: Region.SKY,
    Label.CLOUD_SHADE: Region.SKY,
    Label.FAR: Region.SCENERY,
    Label.TREES: Region.SCENERY,
    Label.LAND: Region.LAND,
    Label.WALKWAY: Region.WALKWAY,
    Label.KERB: Region.WALKWAY,
    Label.ROAD: Region.ROAD,
    Label.ROAD_BLOCK: Region.ROAD,
    Label.CARPARK: Region.ROAD,
    Label.CROSSING: Region.MARK,
    Label.STOP_LINE: Region.MARK,
    Label.ROAD_DIVIDER: Region.MARK,
    Label.LANE_DIVIDER: Region.MARK,
}
_VEHICLES = {"car", "truck", "bus", "trailer", "construction_vehicle"}
_TABLE = np.zeros(256, np.uint8)
_TABLE[list(_OF_LABEL)] = list(_OF_LABEL.values())


class RegionPainter:
    """Regions of the pictures of a data root, by file name.

    Raises:
        MagicDriveError: the root's tables or maps are missing or damaged.
    """

    def __init__(self, root: Path, version: str) -> None:
        self._root = root
        self._shots: dict[str, tuple[Footage, Shot]] = {
            shot.filename: (footage, shot) for footage in read_footage(root, version) for shot in footage.shots
        }
        self._places: dict[str, Place] = {}

    def of_frame(self, filename: str, framing: Framing) -> Regions:
        """(H, W) regions of a picture as a video frame: of each pixel the region that covers most of it.

        Raises:
            MagicDriveError: the tables know no picture of this name.
        """
        if filename not in self._shots:
            raise MagicDriveError(f"{filename} stands in no table", "run `dvc repro infos`: the data has changed")
        footage, shot = self._shots[filename]
        if footage.location not in self._places:
            shapes = read_shapes(self._root, footage.location)
            self._places[footage.location] = prepare_place(shapes, scenery_of(self._root, footage.location))
        regions = draw_regions(
            shot.lens, self._places[footage.location], footage.things(shot.timestamp), footage.description
        )
        size = framing.width, framing.resized_height
        masks = [cv2.compare(regions, np.full_like(regions, region), cv2.CMP_EQ) for region in Region]  # 0 or 255
        shares = [cv2.resize(mask, size, interpolation=cv2.INTER_AREA) for mask in masks]
        out: Regions = np.argmax(shares, axis=0).astype(np.uint8)[framing.crop :]
        return out


def draw_regions(lens: Lens, place: Place, movers: Things, description: str) -> Regions:
    """(900, 1600) regions of what ``picture.draw`` shows: the same ground, the same things, in the same order.

    Args:
        lens: the camera.
        place: map and scenery.
        movers: the annotated objects at the time of the picture.
        description: of the scene.
    """
    labels = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH), np.uint8)
    paint_sky(labels, lens)
    paint(labels, place.ground, lens)
    regions = np.repeat(_TABLE[labels][..., None], 3, axis=2)
    things = seen(movers.joined(standing(place.scenery, lens)), lens, SEEN)
    faces = faces_of(things, lens, light_of(description), np.empty((0, 2)))
    own = np.array([_of_thing(name) for name in things.names], dtype=np.int64)
    colours = np.repeat(own[faces.owners][:, None], 3, axis=1)
    # Beyond where edges are drawn smoothly: a region has no shades.
    fill(regions, replace(faces, colours=colours, away=faces.away + SMOOTH), lens)
    return np.ascontiguousarray(regions[..., 0])


def _of_thing(name: str) -> Region:
    if name not in CLASSES.values():
        return Region.SCENERY
    return Region.VEHICLE if name in _VEHICLES else Region.SMALL
