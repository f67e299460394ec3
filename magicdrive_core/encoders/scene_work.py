"""What there is to encode: the clips of each training scene, at each size and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from magicdrive_core.config import Bucket, parse_size
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.records import Outline, Scene
from magicdrive_core.encoders.vae import latent_shape
from magicdrive_core.errors import MagicDriveError

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def begins_as(frames: int, longer: int, chunk_frames: int | None) -> bool:
    """Whether a clip's latents are the first ones of a longer clip from the same frame.

    The encoder is causal, and its norms see one chunk at a time: so it is if the chunks have the same lengths. The
    first chunk takes the frames that do not fill one.
    """
    return chunk_frames is not None and chunk_frames <= frames and (longer - frames) % chunk_frames == 0


@dataclass(frozen=True)
class EncoderSettings:
    """The VAE and how it is used."""

    folder: str
    scaling_factor: float
    latent_channels: int
    chunk_frames: int | None
    dtype: str  # of the stored moments


@dataclass(frozen=True)
class SceneWork:
    """All clips of one scene at one size. Pictures are read once for all lengths."""

    scene: str
    pictures: list[list[Path]]  # F, V
    size: str
    starts: dict[int, list[int]]  # by frames of the clip

    def encoded(self, chunk_frames: int | None) -> dict[int, list[int]]:
        """The clips that the encoder must see: the others are the first chunks of a longer clip from the same frame."""
        left: dict[int, list[int]] = {}
        for frames, starts in sorted(self.starts.items(), reverse=True):
            longer = {start for n in left if begins_as(frames, n, chunk_frames) for start in left[n]}
            left[frames] = [start for start in starts if start not in longer]
        return left

    def frames(self, chunk_frames: int | None) -> int:
        """Frames that the encoder must see, all views."""
        views = len(self.pictures[0])
        return views * sum(frames * len(starts) for frames, starts in self.encoded(chunk_frames).items())

    def bytes(self, settings: EncoderSettings) -> int:
        """Size of the moments."""
        views, width = len(self.pictures[0]), DTYPES[settings.dtype].itemsize
        values = [
            len(starts)
            * views
            * 2
            * settings.latent_channels
            * int(np.prod(latent_shape(frames, *parse_size(self.size))))
            for frames, starts in self.starts.items()
        ]
        return width * sum(values)


def plan_scenes(scenes: Sequence[Scene], root: Path, buckets: Sequence[Bucket], stride: int) -> list[SceneWork]:
    """What is to be encoded of the training scenes; what several buckets have in common is there once.

    A bucket that is longer than every scene has no clips: training leaves it out and says so (``training/plan.py``).

    Raises:
        MagicDriveError: no bucket has a clip.
    """
    starts: dict[tuple[str, str], dict[int, set[int]]] = {}
    outlines = [Outline.of(scene) for scene in scenes]
    for bucket in buckets:
        for clip in list_clips(outlines, "train", bucket.frames, stride, whole=bucket.whole):
            starts.setdefault((clip.scene, bucket.resolution), {}).setdefault(clip.frames, set()).add(clip.start)
    if not starts:
        raise MagicDriveError(
            "no training scene is long enough for any bucket", "add a bucket of 1 frame, or longer scenes"
        )
    pictures = {scene.token: [[root / path for path in views] for views in scene.pictures] for scene in scenes}
    return [
        SceneWork(
            token, pictures[token], size, {frames: sorted(chosen) for frames, chosen in sorted(by_frames.items())}
        )
        for (token, size), by_frames in sorted(starts.items())
    ]
