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
        """Framing from the full-size image to the display size: ``width`` columns at 16:9, nothing cropped."""
        return Framing(self.width * PICTURE_HEIGHT // PICTURE_WIDTH, self.width)

    def real(self, frame: int) -> Views:
        """Reads the pictures of the data set at a frame, resized to the display size.

        Args:
            frame: index of the frame in the scene.

        Returns:
            RGB views (V, H, W, 3).
        """
        return np.stack([self._fit(self.root / path) for path in self.scene.pictures[frame]])

    def conditions(self, frame: int) -> Views:
        """Draws the boxes, and the BEV map on the ground, on a dark background.

        Args:
            frame: index of the frame in the scene.

        Returns:
            RGB views (V, H, W, 3).
        """
        scene, framing, bev_map = self.scene, self.framing, unpack(self.bits[frame])
        blank = np.full((framing.height, framing.width, 3), BACKGROUND, dtype=np.uint8)
        views = []
        for v in range(len(VIEWS)):
            camera = scene.intrinsics[frame, v], scene.camera_to_lidar[frame, v]
            ground = draw_ground(blank, bev_map, *camera, scene.lidar_to_ego[frame], framing)
            views.append(draw_boxes(ground, *self._boxes(frame), *camera, framing))
        return np.stack(views)

    def box_layers(self, frame: int) -> NDArray[np.uint8]:
        """Draws the boxes on a transparent background.

        Args:
            frame: index of the frame in the scene.

        Returns:
            RGBA layers (V, H, W, 4).
        """
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
        """Draws a frame from above (``bev_panel``).

        Args:
            frame: index of the frame in the scene.
            pixels: width and height of the panel in pixels.

        Returns:
            The RGB panel (pixels, pixels, 3).
        """
        return bev_panel(unpack(self.bits[frame]), *self._boxes(frame), pixels)

    def generated(self, folder: Path, record: ItemRecord) -> Iterator[Views]:
        """Yields the frames of a generated clip, all views at once, resized to the display size.

        Args:
            folder: folder of the item.
            record: record of the item.

        Yields:
            RGB views (V, H, W, 3), one array for each of the ``record.frames`` frames.

        Raises:
            MagicDriveError: a video or a folder of frames is missing or broken.
            OSError: the image of a clip of a single frame is missing or broken.
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
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            image.draft("RGB", (self.framing.width, self.framing.height))  # decodes JPEG at a fraction of its size
            size = self.framing.width, self.framing.height
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))
