"""Region labels of rendered pictures: the same drawing in flat colours, one of a few regions for each pixel."""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import cv2
import numpy as np
from einops import repeat
from numpy.typing import NDArray

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, Framing
from magicdrive_core.synthetic.camera import PosedCamera
from magicdrive_core.synthetic.footage import CATEGORY_CLASSES, Footage, Shot, read_footage
from magicdrive_core.synthetic.ground import MAP_RANGE, Label, paint, read_layers
from magicdrive_core.synthetic.light import light_of
from magicdrive_core.synthetic.render import StaticWorld, on_ground, prepare_world
from magicdrive_core.synthetic.scenery import load_scenery
from magicdrive_core.synthetic.sky import paint_sky
from magicdrive_core.synthetic.solids import SMOOTH, Solids, faces_of, fill, visible

Regions = NDArray[np.uint8]  # (H, W) values of Region


class Region(IntEnum):
    """Kinds of surface that are distinguished in pictures."""

    SKY = 0
    ROAD = 1
    MARK = 2  # pedestrian crossings, stop lines and dividers
    WALKWAY = 3
    LAND = 4
    SCENERY = 5  # buildings, trees, lamps, skyline: in no table, so no condition describes them
    VEHICLE = 6  # cars, trucks, buses, trailers, construction vehicles
    SMALL = 7  # pedestrians, two-wheelers, cones, barriers


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
    """Draw the regions of the pictures of a data root.

    Args:
        root: the data root.
        version: name of the table folder.

    Raises:
        MagicDriveError: tables or maps of the root are missing or damaged.
    """

    def __init__(self, root: Path, version: str) -> None:
        self._root = root
        self._shots: dict[str, tuple[Footage, Shot]] = {
            shot.filename: (footage, shot) for footage in read_footage(root, version) for shot in footage.shots
        }
        self._worlds: dict[str, StaticWorld] = {}

    def of_frame(self, filename: str, framing: Framing) -> Regions:
        """Draw the regions of a picture as a video frame.

        Args:
            filename: path of the picture below the data root.
            framing: size and crop of the video.

        Returns:
            (H, W): for each pixel the region that covers most of it.

        Raises:
            MagicDriveError: the tables hold no picture of this name.
        """
        if filename not in self._shots:
            raise MagicDriveError(f"{filename} is in no table", "run `dvc repro infos`: the data has changed")
        footage, shot = self._shots[filename]
        if footage.location not in self._worlds:
            layers = read_layers(self._root, footage.location)
            self._worlds[footage.location] = prepare_world(layers, load_scenery(self._root, footage.location))
        regions = draw_regions(
            shot.camera, self._worlds[footage.location], footage.solids_at(shot.timestamp), footage.description
        )
        size = framing.width, framing.resized_height
        masks = [cv2.compare(regions, np.full_like(regions, region), cv2.CMP_EQ) for region in Region]  # 0 or 255
        shares = [cv2.resize(mask, size, interpolation=cv2.INTER_AREA) for mask in masks]
        out: Regions = np.argmax(shares, axis=0).astype(np.uint8)[framing.crop :]
        return out


def draw_regions(camera: PosedCamera, world: StaticWorld, movers: Solids, description: str) -> Regions:
    """Draw the regions of a picture: the same ground and solids as ``render.draw``, in the same order.

    Args:
        camera: the camera.
        world: map and scenery.
        movers: the annotated objects at the time of the picture.
        description: description of the scene.

    Returns:
        (900, 1600) regions.
    """
    labels = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH), np.uint8)
    paint_sky(labels, camera)
    paint(labels, world.ground, camera)
    regions = repeat(_TABLE[labels], "h w -> h w c", c=3)  # as a picture, which ``fill`` expects
    solids = visible(movers.joined(on_ground(world.scenery, camera)), camera, MAP_RANGE)
    faces = faces_of(solids, camera, light_of(description), np.empty((0, 2)))
    region_of = np.array([_of_solid(name) for name in solids.names], dtype=np.int64)
    colours = repeat(region_of[faces.owners], "f -> f c", c=3)
    # Move faces beyond SMOOTH, where edges are not anti-aliased: regions cannot be mixed.
    fill(regions, replace(faces, colours=colours, away=faces.away + SMOOTH), camera)
    return np.ascontiguousarray(regions[..., 0])


def _of_solid(name: str) -> Region:
    if name not in CATEGORY_CLASSES.values():
        return Region.SCENERY
    return Region.VEHICLE if name in _VEHICLES else Region.SMALL
