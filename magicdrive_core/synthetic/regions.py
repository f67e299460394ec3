"""Region labels of rendered pictures: one of a few kinds of surface for each pixel."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.synthetic.footage import CATEGORY_CLASSES, Footage, Shot, read_footage
from magicdrive_core.synthetic.ground import Label, read_layers
from magicdrive_core.synthetic.light import Picture, light_of
from magicdrive_core.synthetic.render import StaticWorld, draw, prepare_world
from magicdrive_core.synthetic.scenery import load_scenery
from magicdrive_core.synthetic.surfaces import NONE, Surfaces, draw_surfaces

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
        """Draw the regions of a picture as a video frame, see ``regions_of``.

        Args:
            filename: path of the picture below the data root.
            framing: size and crop of the video.

        Returns:
            (H, W) regions.

        Raises:
            MagicDriveError: the tables hold no picture of this name.
        """
        return regions_of(self.surfaces(filename), framing)

    def footage(self, filename: str) -> Footage:
        """Look up the footage that a picture belongs to.

        Args:
            filename: path of the picture below the data root.

        Returns:
            The footage of its scene.

        Raises:
            MagicDriveError: the tables hold no picture of this name.
        """
        return self._find(filename)[0]

    def surfaces(self, filename: str, footage: Footage | None = None) -> Surfaces:
        """Draw the surfaces of a picture.

        Args:
            filename: path of the picture below the data root.
            footage: edited footage of its scene; None: the tables'.

        Returns:
            The surfaces, of which ``regions_of`` makes regions and ``correspond`` the way to other pictures.

        Raises:
            MagicDriveError: the tables hold no picture of this name.
        """
        own, shot = self._find(filename)
        return draw_surfaces(shot.camera, self._world(own.location), (footage or own).solids_at(shot.timestamp))

    def render(self, filename: str, footage: Footage) -> Picture:
        """Render a picture of edited footage.

        Args:
            filename: path of the picture below the data root.
            footage: edited footage of its scene.

        Returns:
            (900, 1600, 3) red, green, blue.

        Raises:
            MagicDriveError: the tables hold no picture of this name.
        """
        own, shot = self._find(filename)
        movers = footage.solids_at(shot.timestamp)
        picture = draw(shot.camera, light_of(footage.description, own.location), self._world(own.location), movers)
        return np.ascontiguousarray(picture[..., ::-1])

    def _find(self, filename: str) -> tuple[Footage, Shot]:
        if filename not in self._shots:
            raise MagicDriveError(f"{filename} is in no table", "run `dvc repro infos`: the data has changed")
        return self._shots[filename]

    def _world(self, location: str) -> StaticWorld:
        if location not in self._worlds:
            layers = read_layers(self._root, location)
            self._worlds[location] = prepare_world(layers, load_scenery(self._root, location))
        return self._worlds[location]


def regions_of(surfaces: Surfaces, framing: Framing) -> Regions:
    """Reduce the surfaces of a picture to the regions of a video frame.

    Args:
        surfaces: the surfaces of the picture.
        framing: size and crop of the video.

    Returns:
        (H, W): for each pixel the region that covers most of it.
    """
    regions = _TABLE[surfaces.labels]
    region_of = np.array([_of_solid(name) for name in surfaces.solids.names], dtype=np.uint8)
    solid = surfaces.faces != NONE
    regions[solid] = region_of[surfaces.owners[surfaces.faces[solid]]]
    size = framing.width, framing.resized_height
    masks = [cv2.compare(regions, np.full_like(regions, region), cv2.CMP_EQ) for region in Region]  # 0 or 255
    shares = [cv2.resize(mask, size, interpolation=cv2.INTER_AREA) for mask in masks]
    out: Regions = np.argmax(shares, axis=0).astype(np.uint8)[framing.crop :]
    return out


def _of_solid(name: str) -> Region:
    if name not in CATEGORY_CLASSES.values():
        return Region.SCENERY
    return Region.VEHICLE if name in _VEHICLES else Region.SMALL
