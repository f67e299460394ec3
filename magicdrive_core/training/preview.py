"""Previews: the same few validation clips drawn with the EMA weights, below the real ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from magicdrive_core.config.schema import Bucket, Config, Stage, parse_size
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.conditions import clip_conditions
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.device import this_device
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.encoders.caches import open_text
from magicdrive_core.encoders.vae import Vae, latent_shape
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.inference.guided_sampling import sample_latents, unconditional
from magicdrive_core.model.inputs import Conditions, collate
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import sequence_group_of
from magicdrive_core.training.statistics import StopSource, stop_requested_in_group
from magicdrive_core.utils.files import atomic_file, read_json
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.sheets import contact_sheet, six_views

logger = logging.getLogger(__name__)

STEPS = 10  # of sampling: enough to see layout and colours
SEED = 1024
SHEET_WIDTH = 240  # pixels of a view
CAPTION_LETTERS = 60  # of a clip's name and description above its three views


@dataclass(frozen=True)
class _PreviewClip:
    """A validation clip as the preview shows it."""

    conditions: Conditions
    real: Picture  # the six views of the middle frame
    name: str  # and description of its scene


class Preview:
    """Draws validation clips of a stage, one after the other, on rank 0 and the ranks that share its clips.

    Args:
        config: how generation samples and decodes, noise levels, caches.
        bucket: size of the clips.
        clips: clips of equal length, each with its scene.
        project: the project's folder.
    """

    def __init__(self, config: Config, bucket: Bucket, clips: Sequence[tuple[Scene, Clip]], project: Path) -> None:
        size, frames = parse_size(bucket.resolution), clips[0][1].frames
        self._middle = frames // 2
        self._latent_shape = latent_shape(frames, *size)
        self._settings = config.generate
        self._flow = RectifiedFlow(config.flow.base_pixels)
        self._chunk_frames = config.vae.chunk_frames
        self._low_precision = config.training.precision == "bf16" and this_device().type != "cpu"
        self._project = project
        maps, text = BevMaps(config, project), open_text(config, project)
        self._clips = []
        for scene, clip in clips:
            bits = maps.of_clip(scene, clip, bucket.resolution)
            conditions = clip_conditions(scene, clip, bucket.resolution, bits, published=config.published)
            paths = scene.pictures[clip.start + self._middle]
            real = [read_picture(project / config.data.root / path, Framing(*size)) for path in paths]
            batch = collate([conditions], [text.features(conditions.caption)], config.text.max_tokens)
            name = shorten(f"{scene.name}: {scene.description}", CAPTION_LETTERS, placeholder=" ...")
            self._clips.append(_PreviewClip(batch, six_views(np.stack(real), SHEET_WIDTH), name))

    @classmethod
    def of(cls, config: Config, stage: Stage, project: Path = Path()) -> Preview | None:
        """Choose ``training.preview_clips`` validation clips of the stage's smallest videos, else smallest images.

        Args:
            config: all settings of the run.
            stage: whose buckets give size and length.
            project: the project's folder.

        Returns:
            A preview of the first clip of each chosen scene, spread over all scenes; None without a validation clip.

        Raises:
            MagicDriveError: the infos, a cache or a picture are missing.
        """
        scenes = read_scenes(project / "artifacts/infos")
        by_token = {scene.token: scene for scene in scenes}
        buckets = config.training.stage(stage).buckets
        for bucket in sorted(buckets, key=lambda b: (b.frames == 1, b.frames, parse_size(b.resolution))):
            found = list_clips(scenes, "val", bucket.frames, 1, whole=bucket.whole)
            found = [clip for clip in found if clip.frames == found[0].frames]
            if found:
                count = min(config.training.preview_clips, len(found))
                chosen = [found[index * len(found) // count] for index in range(count)]
                return cls(config, bucket, [(by_token[clip.scene], clip) for clip in chosen], project)
        logger.warning("%s: no previews, because the data has no validation scene", stage)
        return None

    def sample(self, network: MagicDrive, stop: StopSource) -> list[Tensor] | None:
        """Sample each clip, on all ranks that share the network's work.

        Args:
            network: with the weights to show.
            stop: checked before each clip, on all of these ranks together.

        Returns:
            Scaled latents (V, C, T, h, w) in fp32 of each clip; None where a stop was requested meanwhile.
        """
        device, settings = network.before_proj.weight.device, self._settings
        latents = []
        for clip in self._clips:
            if stop_requested_in_group(stop, sequence_group_of(network)):
                return None
            conditions = replace(clip.conditions.to(device), pad_patches=settings.pad_patches)
            sampled = sample_latents(
                network,
                conditions,
                self._latent_shape,
                steps=STEPS,
                guidance=settings.guidance,
                flow=self._flow,
                generator=torch.Generator().manual_seed(SEED),
                null=unconditional(network, conditions, settings.unconditional, zero_map=settings.use_map0),
                step_cache=settings.step_cache,
            )
            latents.append(sampled[0])
        return latents

    @torch.no_grad()
    def write(self, latents: Sequence[Tensor], step: int, path: Path, stop: StopSource) -> bool:
        """Decode the middle frames and write them below the real ones as a PNG, a column for each clip.

        The VAE is in memory only meanwhile.

        Args:
            latents: (V, C, T, h, w) for each clip, as ``sample`` returned them.
            step: finished training steps, for the title.
            path: file to write.
            stop: checked before each clip.

        Returns:
            False where a stop was requested meanwhile; no file is written then.
        """
        encoder = read_json(self._project / "artifacts/encoders/encoders.json")["vae"]
        vae = Vae.load(
            self._project / encoder["path"],
            scaling_factor=encoder["scaling_factor"],
            chunk_frames=self._chunk_frames,
            device=latents[0].device,
            dtype=torch.bfloat16 if self._low_precision else torch.float32,
            stripe_rows=self._settings.stripe_rows,
        )
        generated = []
        for each in latents:
            if stop.requested:
                return False
            views = [self._middle_frame(vae, view) for view in each]  # one at a time, as generation decodes
            generated.append(six_views(np.stack(views), SHEET_WIDTH))
        sheet = contact_sheet(
            [[clip.real for clip in self._clips], generated],
            ["real", "generated"],
            [clip.name for clip in self._clips],
            title=f"step {step}",
        )
        with atomic_file(path) as partial:
            Image.fromarray(sheet).save(partial, format="PNG")
        return True

    def _middle_frame(self, vae: Vae, latents: Tensor) -> NDArray[np.uint8]:
        """Decode the middle frame (H, W, 3) of a view's latents (C, T, h, w)."""
        frames = 0
        for chunk in vae.decode(latents[None]):
            if self._middle < frames + chunk.shape[1]:
                return chunk[0, self._middle - frames]
            frames += chunk.shape[1]
        raise AssertionError("the VAE decoded fewer frames than the clip has")
