"""One scene as images of one display size: its real views, its conditions drawn, and what was generated from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.data.bev_maps import unpack
from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.geometry.boxes import corners
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS, Framing
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord
from magicdrive_core.video.overlays import bev_panel, box_layer, draw_boxes, draw_ground
from magicdrive_core.video.palette import BACKGROUND

Views = NDArray[np.uint8]  # V, H, W, 3


@dataclass(frozen=True)
class SceneViews:
    """Draws the frames of one scene, six views at a time.

    Attributes:
        scene: poses, boxes and the names of the pictures.
        bits: BEV maps (F, cells, cells), uint8 with bit c for layer c.
        root: data root with the real pictures.
        width: pixels of a view.
    """

    scene: Scene
    bits: NDArray[np.uint8]
    root: Path
    width: int

    @property
    def framing(self) -> Framing:
        """Framing of the full-size image, black rows included, at the display size."""
        return Framing(self.width * PICTURE_HEIGHT // PICTURE_WIDTH, self.width)

    def real(self, frame: int) -> Views:
        """Returns the pictures of the data set (V, H, W, 3) at a frame."""
        return np.stack([self._fit(self.root / path) for path in self.scene.pictures[frame]])

    def conditions(self, frame: int) -> Views:
        """Draws boxes, and the BEV map on the ground, on a dark background: (V, H, W, 3)."""
        scene, framing, bev_map = self.scene, self.framing, unpack(self.bits[frame])
        blank = np.full((framing.height, framing.width, 3), BACKGROUND, dtype=np.uint8)
        views = []
        for v in range(len(VIEWS)):
            camera = scene.intrinsics[frame, v], scene.camera_to_lidar[frame, v]
            ground = draw_ground(blank, bev_map, *camera, scene.lidar_to_ego[frame], framing)
            views.append(draw_boxes(ground, *self._boxes(frame), *camera, framing))
        return np.stack(views)

    def box_layers(self, frame: int) -> NDArray[np.uint8]:
        """Draws the boxes on a transparent background: (V, H, W, 4)."""
        scene = self.scene
        return np.stack(
            [
                box_layer(
                    *self._boxes(frame), scene.intrinsics[frame, v], scene.camera_to_lidar[frame, v], self.framing
                )
                for v in range(len(VIEWS))
            ]
        )

    def bev(self, frame: int, pixels: int) -> Picture:
        """Draws a frame from above, ``pixels`` wide and high: (pixels, pixels, 3)."""
        return bev_panel(unpack(self.bits[frame]), *self._boxes(frame), pixels)

    def generated(self, folder: Path, record: ItemRecord) -> Iterator[Views]:
        """Yields the frames (V, H, W, 3) of a generated clip.

        Args:
            folder: folder of the item.
            record: its record.

        Raises:
            MagicDriveError: a file is missing or broken.
        """
        files = [folder / record.views[view].file for view in VIEWS]
        if record.frames == 1:
            yield np.stack([self._fit(file) for file in files])
            return
        size = self.framing.height, self.framing.width
        for frames in zip(*(read_view(file, size) for file in files), strict=True):
            yield np.stack(frames)

    def _boxes(self, frame: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        boxes = self.scene.boxes[frame]
        return corners(boxes.boxes), np.array([CLASSES.index(name) for name in boxes.names], dtype=np.int64)

    def _fit(self, path: Path) -> Picture:
        with Image.open(path) as image:
            image.draft("RGB", (self.framing.width, self.framing.height))  # decodes JPEG at a fraction of its size
            size = self.framing.width, self.framing.height
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))
