"""First frames that are given (generate.initial_frames): real pictures of the scene, or an earlier generation.

They are part of the written video, before what is generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from magicdrive_core.config.schema import Config, parse_size
from magicdrive_core.data.pictures import Pixels, read_clip
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.geometry.cameras import VIEWS, Framing
from magicdrive_core.inference.items import REAL, Item
from magicdrive_core.inference.writer import full_picture
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord


@dataclass(frozen=True)
class Beginning:
    """The given frames of one item.

    Attributes:
        pixels: (V, F, H, W, 3), the last of them at the network's size: what the first window goes on from.
    """

    pixels: Pixels

    def pictures(self, view: int) -> Iterator[Picture]:
        """All of them as they are written, (900, 1600, 3)."""
        return map(full_picture, self.pixels[view])


@dataclass(frozen=True)
class EarlierItem(Beginning):
    """An item of an earlier generation."""

    folder: Path
    record: ItemRecord

    def pictures(self, view: int) -> Iterator[Picture]:
        return read_view(self.folder / self.record.views[VIEWS[view]].file)


def read_beginning(config: Config, item: Item, scene: Scene, frames: int, project: Path = Path()) -> Beginning:
    """The first frames of an item, the last ``frames`` of them for the network.

    Raises:
        MagicDriveError: a picture or a video is missing or broken.
    """
    settings = config.generate
    assert settings.initial_frames is not None
    if settings.initial_frames == REAL:
        clip = Clip(scene.token, item.clip.start, frames)
        return Beginning(read_clip(project / config.data.root, scene, clip, settings.resolution))
    folder = project / settings.initial_frames / item.name
    record = ItemRecord.read(folder)
    framing = Framing(*parse_size(settings.resolution))
    views = []
    for view in VIEWS:
        last = islice(read_view(folder / record.views[view].file), item.begun - frames, None)
        views.append([_framed(picture, framing) for picture in last])
    return EarlierItem(np.asarray(views), folder, record)


def _framed(picture: Picture, framing: Framing) -> Picture:
    """A written picture at the network's size: ``framing.full_picture`` undone."""
    resized = Image.fromarray(picture).resize((framing.width, framing.resized_height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[framing.crop :]
