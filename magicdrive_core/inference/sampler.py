"""From an item to its latents and frames: conditions, noise, and window after window for a long clip.

Shapes: V views, C latent channels, T latent frames, h, w rows and columns of latents; F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
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
from magicdrive_core.inference.items import REAL, Item, Window, decoded_frames, item_seed, item_windows
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.model.inputs import Conditions, collate
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.frames import crop_to_frame, full_size_image, read_view
from magicdrive_core.video.item_record import ItemRecord

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Sampler:
    """Samples one item; all its random numbers come from seeds of the item, so that no other item changes them.

    Attributes:
        config: settings of sampling.
        models: network, VAE and text features.
        item: the clip to generate.
        scene: its scene, with the edits applied.
        edits: the edits, which decide whether BEV maps have to be drawn again.
        maps: BEV maps of all scenes.
        progress: wraps the sampling steps of each window.
    """

    config: Config
    models: Models
    item: Item
    scene: Scene
    edits: Edits
    maps: BevMaps
    progress: Progress = iter

    @property
    def windows(self) -> list[Window]:
        """Windows in the order in which they are sampled; starts are counted from the clip's."""
        return item_windows(self.config, self.item)

    @cached_property
    def first(self) -> ClipConditions:
        """Conditions of the first window."""
        return self.conditions(self.windows[0])

    @cached_property
    def features(self) -> Tensor:
        """Text features (l, D) of the clip's caption."""
        return self.models.features(self.first.caption)

    @property
    def objects(self) -> list[str]:
        """Instance tokens of all objects of the clip, sorted."""
        clip = self.item.clip
        return sorted(
            {token for frame in self.scene.boxes[clip.start : clip.start + clip.frames] for token in frame.ids}
        )

    def conditions(self, window: Window) -> ClipConditions:
        """Makes the conditions of the frames of a window.

        Args:
            window: one of ``windows``.

        Returns:
            Conditions of F = ``window.frames`` frames; ego motion is relative to the first of them.
        """
        size = self.config.generate.resolution
        clip = Clip(self.item.clip.scene, self.item.clip.start + window.start, window.frames)
        bits = self.maps.of_clip(self.scene, clip, size, draw=self.edits.moves_lidar(self.scene.name))
        return clip_conditions(self.scene, clip, size, bits, published=self.config.published)

    def initial_frames(self, project: Path) -> InitialFrames | None:
        """Reads the item's initial frames.

        Args:
            project: folder of the project.

        Returns:
            The frames; None if everything is generated.

        Raises:
            MagicDriveError: a picture or a video is missing or broken.
        """
        if self.config.generate.initial_frames is None:
            return None
        return read_initial_frames(self.config, self.item, self.scene, self.windows[0].conditioning_frames, project)

    def sample(self, processes: SingleProcess, initial: InitialFrames | None = None) -> list[Tensor]:
        """Samples all windows of the clip.

        A window continues from the last frames of the window before, which are decoded and encoded again. The latent
        frames themselves would not fit: the first one of a window holds one frame, all others hold four.

        Args:
            processes: the processes that sample together; all of them call this.
            initial: initial frames of the item; only the leader needs them. None: it has none, or this is a follower.

        Returns:
            Scaled latents (V, C, T, h, w) in fp32 of each window, on the CPU.
        """
        latents: list[Tensor] = []
        for number, window in enumerate(self.windows):
            conditioning = None
            if window.conditioning_latents:

                def encode(window: Window = window) -> Tensor:
                    frames = initial.pixels if initial and not latents else self._last_frames(latents[-1], window)
                    return self._encode(frames)

                conditioning = processes.from_leader(encode)
            latents.append(self._sample_window(number, window, conditioning, processes.guidance_group))
        return latents

    def decode_views(self, latents: Sequence[Tensor]) -> Iterator[Iterator[Picture]]:
        """Decodes the generated frames that are written.

        Args:
            latents: what ``sample`` returned.

        Yields:
            For each view, an iterator over its frames (H, W, 3) without the initial ones. Few are in memory at a time.
        """
        self.models.move_to_device(self.models.vae.model)
        for view in range(len(latents[0])):
            new = (
                islice(self._decode(part[view]), window.conditioning_frames, None)
                for window, part in zip(self.windows, latents, strict=True)
            )
            yield islice(chain.from_iterable(new), self.item.kept - self.item.initial_frames)

    def _sample_window(
        self, number: int, window: Window, conditioning: Tensor | None, guidance_group: RankGroup | None
    ) -> Tensor:
        """Samples one window.

        Args:
            number: number of the window in the clip, part of its seed.
            window: the window.
            conditioning: latents (V, C, window.conditioning_latents, h, w) that it continues from; None: it has none.
            guidance_group: ranks that share the two passes of guidance.

        Returns:
            Latents (V, C, T, h, w) on the CPU.
        """
        models, settings = self.models, self.config.generate
        clip = self.first if number == 0 else self.conditions(window)
        features = self.features
        models.move_to_device(models.network)
        generator = torch.Generator().manual_seed(item_seed(self.config, self.item, f"window {number}"))
        conditions = self._with_object_latents(collate([clip], [features], self.config.text.max_tokens), clip.box_ids)
        shape = latent_shape(window.frames, *parse_size(settings.resolution))
        x_0 = x_mask = None
        if conditioning is not None:
            x_0 = torch.zeros(1, *conditioning.shape[:2], *shape)
            x_0[0, :, :, : window.conditioning_latents] = conditioning
            x_mask = (torch.arange(shape[0]) >= window.conditioning_latents)[None]
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

    def _with_object_latents(self, conditions: Conditions, ids: list[str]) -> Conditions:
        """Adds a random vector for each object, the same in all windows of the clip, if the network wants any."""
        network = self.models.network.config
        if not network.instance_latent:
            return conditions
        objects = self.objects
        generator = torch.Generator().manual_seed(item_seed(self.config, self.item, "objects"))
        drawn = torch.randn(max(1, len(objects)), network.class_width or network.width, generator=generator)
        rows = [objects.index(token) for token in ids] or [0]
        return replace(conditions, box_latent=drawn[None, rows])

    def _last_frames(self, latents: Tensor, following: Window) -> Pixels:
        """Decodes the last frames (V, F, H, W, 3) of a window, those that the ``following`` one continues from."""
        self.models.move_to_device(self.models.vae.model)
        first = decoded_frames(latents.shape[2]) - following.conditioning_frames
        return np.asarray([list(islice(self._decode(view), first, None)) for view in latents])

    def _encode(self, pixels: Pixels) -> Tensor:
        """Encodes frames (V, F, H, W, 3) to latents (V, C, T, h, w), without sampling noise."""
        models = self.models
        models.move_to_device(models.vae.model)
        return models.vae.latents(models.vae.moments(to_video(pixels)))

    def _decode(self, latents: Tensor) -> Iterator[Picture]:
        """Yields the frames (H, W, 3) of one view's latents (C, T, h, w)."""
        for group in self.models.vae.decode(latents[None].to(self.models.device)):
            yield from group[0]


@dataclass(frozen=True)
class InitialFrames:
    """Frames that an item starts with and that are not generated (``generate.initial_frames``).

    Attributes:
        pixels: the last of them (V, F, H, W, 3) at the network's size, which condition the first window.
    """

    pixels: Pixels

    def images(self, view: int) -> Iterator[Picture]:
        """Yields all initial frames of one view at full size.

        Args:
            view: index of the view in ``VIEWS``.

        Yields:
            RGB images (900, 1600, 3), uint8, in order of time.
        """
        return map(full_size_image, self.pixels[view])


@dataclass(frozen=True)
class EarlierItem(InitialFrames):
    """Initial frames that are the files of an earlier generation; they are written again bit for bit if lossless.

    Attributes:
        folder: folder of the earlier item.
        record: its record.
    """

    folder: Path
    record: ItemRecord

    def images(self, view: int) -> Iterator[Picture]:
        """Yields all frames of one view as the earlier item's file holds them.

        Args:
            view: index of the view in ``VIEWS``.

        Yields:
            RGB images (900, 1600, 3), uint8, in order of time.
        """
        return read_view(self.folder / self.record.views[VIEWS[view]].file)


def read_initial_frames(
    config: Config, item: Item, scene: Scene, conditioning: int, project: Path = Path()
) -> InitialFrames:
    """Reads the initial frames of an item.

    Args:
        config: settings; ``generate.initial_frames`` names the source and must not be null.
        item: the item.
        scene: its scene.
        conditioning: number of frames, the last ones, that condition the first window.
        project: folder of the project.

    Returns:
        The frames, of which the last ``conditioning`` are in memory at the network's size.

    Raises:
        MagicDriveError: a picture or a video is missing or broken.
    """
    settings = config.generate
    assert settings.initial_frames is not None
    if settings.initial_frames == REAL:
        clip = Clip(scene.token, item.clip.start, conditioning)
        return InitialFrames(read_clip(project / config.data.root, scene, clip, settings.resolution))
    folder = project / settings.initial_frames / item.name
    record = ItemRecord.read(folder)
    framing = Framing(*parse_size(settings.resolution))
    views = []
    for view in VIEWS:
        last = islice(read_view(folder / record.views[view].file), item.initial_frames - conditioning, None)
        views.append([crop_to_frame(image, framing) for image in last])
    return EarlierItem(np.asarray(views), folder, record)
