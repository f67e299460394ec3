"""VAE moments of clips, encoded when they are asked for (latents.live): the numbers that the cache would hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from magicdrive_core.config import Config
from magicdrive_core.data.pictures import read_clip
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.encoders.scene_work import DTYPES
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.files import read_json


class LiveLatents:
    """Encodes view by view, as ``caches.LatentCache`` reads.

    Args:
        config: of the VAE and the pictures.
        project: the project's folder.
        scenes: by token.

    Raises:
        MagicDriveError: there is no encoder.
    """

    def __init__(self, config: Config, project: Path, scenes: Mapping[str, Scene]) -> None:
        made = read_json(project / "artifacts/encoders/encoders.json", "run `dvc repro encoders`")["vae"]
        self._vae = Vae.load(
            project / made["path"],
            scaling_factor=made["scaling_factor"],
            chunk_frames=config.vae.chunk_frames,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        self._root, self._scenes = project / config.data.root, scenes
        self._dtype, self._scaled = DTYPES[config.latents.dtype], config.latents.scaled_decoding

    def moments(self, size: str, clip: Clip) -> Tensor:
        """(V, 2C, T, h, w): posterior mean and log-variance of a clip's views, in the dtype of the cache.

        Raises:
            MagicDriveError: a picture is missing or broken.
        """
        views = read_clip(self._root, self._scenes[clip.scene], clip, size, scaled=self._scaled)
        return torch.cat([self._vae.moments(to_video(view[None])).cpu() for view in views]).to(self._dtype)
