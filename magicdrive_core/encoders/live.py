"""What the caches would hold, encoded when it is asked for (latents.live, text.live)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from magicdrive_core.config.schema import Config, parse_size
from magicdrive_core.data.pictures import read_clip
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.device import this_device
from magicdrive_core.encoders.caches import TextCache
from magicdrive_core.encoders.encode_latents import DTYPES
from magicdrive_core.encoders.vae import Vae, latent_shape, to_video
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import read_json

HINT = "run `dvc repro encoders`"


class LiveText:
    """Encodes captions, as ``caches.TextCache`` reads; each is kept from its first time on.

    Raises:
        MagicDriveError: there is no encoder.
    """

    def __init__(self, config: Config, project: Path) -> None:
        from magicdrive_core.encoders.text import TextEncoder  # imports transformers, which takes seconds

        made = read_json(project / "artifacts/encoders/encoders.json", HINT)["text"]
        device = this_device()
        self._encoder = TextEncoder.load(project / made["path"], config.text.max_tokens, device)
        self._known: dict[str, Tensor] = {}

    def features(self, caption: str) -> Tensor:
        """(l, D) float32: the features of a caption's own tokens."""
        if caption not in self._known:
            self._known[caption] = self._encoder.encode([caption])[0]
        return self._known[caption]


def open_text(config: Config, project: Path) -> TextCache | LiveText:
    """The features of captions, from the cache or encoded now, as ``text.live`` says.

    Raises:
        MagicDriveError: the cache is missing or stale, or there is no encoder.
    """
    return LiveText(config, project) if config.text.live else TextCache(project / "artifacts/text", config)


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
        made = read_json(project / "artifacts/encoders/encoders.json", HINT)["vae"]
        self._vae = Vae.load(
            project / made["path"],
            scaling_factor=made["scaling_factor"],
            chunk_frames=config.vae.chunk_frames,
            device=this_device(),
        )
        self._root, self._scenes = project / config.data.root, scenes
        self._dtype, self._scaled = DTYPES[config.latents.dtype], config.latents.scaled_decoding

    def moments(self, size: str, clip: Clip, views: Sequence[int] = range(len(VIEWS))) -> Tensor:
        """(V, 2C, T, h, w): posterior mean and log-variance of a clip's views, in the dtype of the cache.

        ``views``: those that are encoded; the others are zeros.

        Raises:
            MagicDriveError: a picture is missing or broken.
        """
        scene, height, width = self._scenes[clip.scene], *parse_size(size)
        frames, h, w = latent_shape(clip.frames, height, width)
        moments = torch.zeros(len(VIEWS), 2 * self._vae.latent_channels, frames, h, w, dtype=self._dtype)
        pictures = read_clip(self._root, scene, clip, size, scaled=self._scaled, views=views)
        for view, frames_of_view in zip(views, pictures, strict=True):
            moments[view] = self._vae.moments(to_video(frames_of_view[None]))[0].cpu()
        return moments
