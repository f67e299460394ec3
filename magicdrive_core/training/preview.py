"""What the network draws so far: one validation clip, always the same, with the EMA weights, beside the real one."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from magicdrive_core.config import Bucket, Config, Stage, parse_size
from magicdrive_core.data.bev_maps import BevMaps
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.conditions import clip_conditions
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.encoders.live import open_text
from magicdrive_core.encoders.vae import Vae, latent_shape
from magicdrive_core.files import atomic_file, read_json
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.model.guidance import sample_latents
from magicdrive_core.model.inputs import Conditions, collate
from magicdrive_core.model.network import MagicDrive
from magicdrive_core.rectified_flow import RectifiedFlow
from magicdrive_core.video.sheets import contact_sheet, six_views

logger = logging.getLogger(__name__)

STEPS = 10  # of sampling: enough to see layout and colours
SEED = 1024
SHEET_WIDTH = 400  # pixels of a view


class Preview:
    """Draws one validation clip of a stage; the ranks that share a clip with rank 0 need one."""

    def __init__(self, config: Config, bucket: Bucket, scene: Scene, clip: Clip, project: Path) -> None:
        size = parse_size(bucket.size)
        self._middle = clip.frames // 2
        self._latent_shape = latent_shape(clip.frames, *size)
        bits = BevMaps(config, project).of_clip(scene, clip, bucket.size)
        told = clip_conditions(scene, clip, bucket.size, bits, published=config.published)
        text = open_text(config, project).features(told.caption)
        self._conditions: Conditions = collate([told], [text], config.text.max_tokens)
        paths = scene.pictures[clip.start + self._middle]
        real = [read_picture(project / config.data.root / path, Framing(*size)) for path in paths]
        self._real = six_views(np.stack(real), SHEET_WIDTH)
        self._guidance = config.generate.guidance
        self._flow = RectifiedFlow(config.flow.base_pixels)
        self._chunk_frames = config.vae.chunk_frames
        self._project = project
        self._caption = told.caption

    @classmethod
    def of(cls, config: Config, stage: Stage, project: Path = Path()) -> Preview | None:
        """The first validation clip of the stage's smallest videos, else of its smallest pictures; None without any."""
        scenes = read_scenes(project / "artifacts/infos")
        buckets = config.training.stage(stage).buckets
        for bucket in sorted(buckets, key=lambda b: (b.frames == 1, b.frames, parse_size(b.size))):
            for clip in list_clips(scenes, "val", bucket.frames, 1, whole=bucket.whole):
                scene = next(scene for scene in scenes if scene.token == clip.scene)
                return cls(config, bucket, scene, clip, project)
        logger.warning("%s: no scene is for validation: no previews", stage)
        return None

    def sample(self, network: MagicDrive) -> Tensor:
        """Latents (V, C, T, h, w) of the clip; on all devices that share the network's work."""
        device = network.before_proj.weight.device
        latents = sample_latents(
            network,
            self._conditions.to(device),
            self._latent_shape,
            steps=STEPS,
            guidance=self._guidance,
            flow=self._flow,
            generator=torch.Generator().manual_seed(SEED),
        )
        return latents[0]

    @torch.no_grad()
    def write(self, latents: Tensor, step: int, path: Path) -> None:
        """The middle frame of ``sample``, below the real one, as a PNG."""
        generated = six_views(self._decode(latents), SHEET_WIDTH)
        sheet = contact_sheet(
            [[self._real], [generated]], ["real", "generated"], title=f"step {step}", subtitle=self._caption
        )
        with atomic_file(path) as partial:
            Image.fromarray(sheet).save(partial, format="PNG")

    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """The middle frame of latents (V, C, T, h, w): (V, H, W, 3). The VAE is in memory only meanwhile."""
        facts = read_json(self._project / "artifacts/encoders/encoders.json")["vae"]
        vae = Vae.load(
            self._project / facts["path"],
            scaling_factor=facts["scaling_factor"],
            chunk_frames=self._chunk_frames,
            device=latents.device,
        )
        frames = 0
        for chunk in vae.decode(latents):
            if self._middle < frames + chunk.shape[1]:
                return chunk[:, self._middle - frames]
            frames += chunk.shape[1]
        raise AssertionError("the VAE gave fewer frames than the clip has")
