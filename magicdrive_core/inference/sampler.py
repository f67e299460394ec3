"""From an item to its latents: conditions, noise of the item's own seed, window by window where a clip is long.

Shapes: V views, C latent channels, T latent frames, h, w latents; F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from magicdrive_core.config.schema import Config, parse_size
from magicdrive_core.data.conditions import clip_conditions
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.pictures import Pixels, read_clip
from magicdrive_core.data.records import Clip, ClipConditions, Scene
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.encoders.vae import latent_shape, to_video
from magicdrive_core.geometry.cameras import VIEWS, Framing
from magicdrive_core.inference.guided_sampling import sample_latents, unconditional
from magicdrive_core.inference.items import REAL, Item, Window, given_frames, item_seed, item_windows
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.model.inputs import Conditions, collate
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.frames import full_size_image, read_view
from magicdrive_core.video.item_record import ItemRecord

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Sampler:
    """Samples one item. Everything random comes from seeds of the item's own, whoever samples what else."""

    config: Config
    models: Models
    item: Item
    scene: Scene  # edited
    edits: Edits
    maps: BevMaps
    progress: Progress = iter

    @property
    def windows(self) -> list[Window]:
        """In their order; starts are counted from the clip's."""
        return item_windows(self.config, self.item)

    @cached_property
    def first(self) -> ClipConditions:
        """What the network is told about the first window."""
        return self.conditions(self.windows[0])

    @cached_property
    def features(self) -> Tensor:
        """Of the clip's text."""
        return self.models.features(self.first.caption)

    @property
    def objects(self) -> list[str]:
        """Instance tokens of the whole clip."""
        clip = self.item.clip
        return sorted(
            {token for frame in self.scene.boxes[clip.start : clip.start + clip.frames] for token in frame.ids}
        )

    def conditions(self, window: Window) -> ClipConditions:
        """What the network is told about a window's frames."""
        size = self.config.generate.resolution
        clip = Clip(self.item.clip.scene, self.item.clip.start + window.start, window.frames)
        bits = self.maps.of_clip(self.scene, clip, size, draw=self.edits.moves_lidar(self.scene.name))
        return clip_conditions(self.scene, clip, size, bits, published=self.config.published)

    def beginning(self, project: Path) -> Beginning | None:
        """The item's first frames, where they are given."""
        if self.config.generate.initial_frames is None:
            return None
        return read_beginning(self.config, self.item, self.scene, self.windows[0].given_frames, project)

    def sample(self, team: SingleProcess, beginning: Beginning | None = None) -> list[Tensor]:
        """Latents (V, C, T, h, w) of each window, on the CPU.

        A window goes on from the pictures that the one before ends with, encoded anew: latent frames are not alike
        (the first of a clip stands for one picture, all others for four), so that none of its own would fit.

        Args:
            team: who sample together; all of them call this.
            beginning: of the leader, where the item has one.
        """
        latents: list[Tensor] = []
        for number, window in enumerate(self.windows):
            given = None
            if window.given:

                def make(window: Window = window) -> Tensor:
                    last = beginning.pixels if beginning and not latents else self._end(latents[-1], window)
                    return self._encode(last)

                given = team.made_once(make)
            latents.append(self._window(number, window, given, team.guidance_group))
        return latents

    def frames(self, latents: Sequence[Tensor]) -> Iterator[Iterator[Picture]]:
        """The generated frames (H, W, 3) that are written, view by view, a few at a time; of what ``sample`` gave."""
        self.models.make_room_for(self.models.vae.model)
        for view in range(len(latents[0])):
            new = (
                islice(self._decoded(part[view]), window.given_frames, None)
                for window, part in zip(self.windows, latents, strict=True)
            )
            yield islice(chain.from_iterable(new), self.item.kept - self.item.begun)

    def _window(self, number: int, window: Window, given: Tensor | None, guidance_group: RankGroup | None) -> Tensor:
        models, settings = self.models, self.config.generate
        told = self.first if number == 0 else self.conditions(window)
        features = self.features
        models.make_room_for(models.network)
        generator = torch.Generator().manual_seed(item_seed(self.config, self.item, f"window {number}"))
        conditions = self._with_objects(collate([told], [features], self.config.text.max_tokens), told.box_ids)
        shape = latent_shape(window.frames, *parse_size(settings.resolution))
        x_0 = x_mask = None
        if given is not None:
            x_0 = torch.zeros(1, *given.shape[:2], *shape)
            x_0[0, :, :, : window.given] = given
            x_mask = (torch.arange(shape[0]) >= window.given)[None]
            x_0 = x_0.to(models.device)
        conditions = replace(conditions.to(models.device), pad_patches=settings.pad_patches)
        latents = sample_latents(
            models.network,
            conditions,
            shape,
            steps=settings.steps,
            guidance=settings.guidance,
            flow=RectifiedFlow(self.config.flow.base_pixels),
            generator=generator,
            x_0=x_0,
            x_mask=x_mask,
            null=unconditional(models.network, conditions, settings.unconditional, zero_map=settings.use_map0),
            guidance_group=guidance_group,
            step_cache=settings.step_cache,
            progress=self.progress,
        )
        return latents[0].cpu()

    def _with_objects(self, conditions: Conditions, ids: list[str]) -> Conditions:
        """With each object's own random vector, the same in all windows of the clip."""
        network = self.models.network.config
        if not network.instance_latent:
            return conditions
        objects = self.objects
        generator = torch.Generator().manual_seed(item_seed(self.config, self.item, "objects"))
        drawn = torch.randn(max(1, len(objects)), network.class_width or network.width, generator=generator)
        rows = [objects.index(token) for token in ids] or [0]
        return replace(conditions, box_latent=drawn[None, rows])

    def _end(self, latents: Tensor, window: Window) -> Pixels:
        """The last pictures of a window (V, F, H, W, 3), those that ``window`` goes on from."""
        self.models.make_room_for(self.models.vae.model)
        frames = given_frames(latents.shape[2])
        ends = [list(islice(self._decoded(view), frames - window.given_frames, None)) for view in latents]
        return np.asarray(ends)

    def _encode(self, pixels: Pixels) -> Tensor:
        """(V, F, H, W, 3) -> (V, C, T, h, w), without noise."""
        models = self.models
        models.make_room_for(models.vae.model)
        return models.vae.latents(models.vae.moments(to_video(pixels)))

    def _decoded(self, latents: Tensor) -> Iterator[Picture]:
        """Frames (H, W, 3) of one view (C, T, h, w), a few at a time."""
        for group in self.models.vae.decode(latents[None].to(self.models.device)):
            yield from group[0]


@dataclass(frozen=True)
class Beginning:
    """The given frames of one item.

    Attributes:
        pixels: (V, F, H, W, 3), the last of them at the network's size: what the first window goes on from.
    """

    pixels: Pixels

    def pictures(self, view: int) -> Iterator[Picture]:
        """All of them as they are written, (900, 1600, 3)."""
        return map(full_size_image, self.pixels[view])


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
    """A written picture at the network's size: ``framing.full_size_image`` undone."""
    resized = Image.fromarray(picture).resize((framing.width, framing.resized_height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[framing.crop :]
