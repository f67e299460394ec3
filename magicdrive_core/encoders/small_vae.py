"""A small CogVideoX VAE, trained on the data's pictures in about a minute, for runs without the published one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from magicdrive_core.config import VaeBuild, parse_size
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Scene
from magicdrive_core.encoders.linear_start import start_linear
from magicdrive_core.encoders.muon import Muon
from magicdrive_core.encoders.planes import use_planes
from magicdrive_core.encoders.vae import Vae, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.progress import track

Pixels = NDArray[np.uint8]
CLIP_FRAMES = 9  # of a training clip at most: three latent frames
EDGE_WEIGHT = 0.25  # of the error of neighbouring pixels' differences: keeps outlines sharp
KL_WEIGHT = 1e-6  # of latent diffusion's: keeps the latents bounded, and hardly blurs
START_FRAMES = 24  # pictures that the linear start is fitted to
ADAM_SHARE = 0.2  # of Muon's learning rate


def build_vae(build: VaeBuild, clips: Pixels) -> Any:
    """Trains a VAE from nothing; the same seed and number of threads give the same weights.

    Args:
        build: sizes and schedule.
        clips: (n, F, H, W, 3) training clips.

    Returns:
        The diffusers ``AutoencoderKLCogVideoX`` in evaluation mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(build.seed)
        model: Any = AutoencoderKLCogVideoX(
            block_out_channels=tuple(build.block_out_channels),
            latent_channels=build.latent_channels,
            layers_per_block=build.layers_per_block,
            norm_num_groups=1,
            sample_height=parse_size(build.resolution)[0],
            sample_width=parse_size(build.resolution)[1],
        )
        use_planes(model)
        start_linear(model, to_video(clips[:START_FRAMES, -1:])[:, :, 0])
        model.train()
        optimizers = _optimizers(model, build.learning_rate)
        schedules = [
            OneCycleLR(o, o.defaults["lr"], total_steps=build.steps, pct_start=0.1, cycle_momentum=False)
            for o in optimizers
        ]
        crops = _crops(build, clips)
        for _ in track(range(build.steps), "VAE", build.steps):
            model.zero_grad()
            _loss(model, to_video(next(crops))).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
    return model.eval()


def _optimizers(model: Any, learning_rate: float) -> list[Optimizer]:
    """Muon for the inner convolutions; Adam for the first and last ones, norms and biases."""
    ends = {id(model.encoder.conv_in.conv.weight), id(model.decoder.conv_out.conv.weight)}
    inner = [p for p in model.parameters() if p.ndim >= 4 and id(p) not in ends]
    rest = [p for p in model.parameters() if p.ndim < 4 or id(p) in ends]
    return [Muon(inner, learning_rate), Adam(rest, ADAM_SHARE * learning_rate, betas=(0.9, 0.99), fused=True)]


def _loss(model: Any, video: Tensor) -> Tensor:
    """Squared error of pixels and of their differences along height and width, and the posterior's divergence."""
    posterior = model.encode(video).latent_dist
    error = model.decode(posterior.sample()).sample - video
    edges = error.diff(dim=3).square().mean() + error.diff(dim=4).square().mean()
    return error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean()


def _crops(build: VaeBuild, clips: Pixels) -> Iterator[Pixels]:
    """Endless random crops: single frames, and every ``clip_every`` steps a clip."""
    rng = np.random.default_rng(build.seed)
    count, frames, height, width = clips.shape[:4]
    step = 0
    while True:
        step += 1
        clip_step = frames > 1 and step % build.clip_every == 0
        parts = []
        for _ in range(1 if clip_step else build.batch):
            clip, top, left = rng.integers((count, height - build.crop + 1, width - build.crop + 1))
            when = slice(None) if clip_step else slice(first := int(rng.integers(frames)), first + 1)
            parts.append(clips[clip, when, top : top + build.crop, left : left + build.crop])
        yield np.stack(parts)


def longest_clip(scenes: Sequence[Scene], at_most: int) -> int:
    """Frames (8n + 1) of the longest clip that some scene has, up to ``at_most``."""
    return (min(at_most, max(map(len, scenes), default=1)) - 1) // 8 * 8 + 1


def draw_clips(scenes: Sequence[Scene], root: Path, size: str, frames: int, count: int, seed: int) -> Pixels:
    """(count, frames, H, W, 3): clips of one view each, spread evenly over scenes, at random times and views.

    Raises:
        MagicDriveError: every scene is too short, or a picture is missing or broken.
    """
    long_enough = [scene for scene in scenes if len(scene) >= frames]
    if not long_enough:
        raise MagicDriveError(
            f"no scene has the {frames} frames that the VAE is built with", "use longer scenes, or a VAE that exists"
        )
    rng = np.random.default_rng(seed)
    framing = Framing(*parse_size(size))
    paths = []
    for index in range(count):
        scene = long_enough[index % len(long_enough)]
        start = int(rng.integers(len(scene) - frames + 1))
        view = int(rng.integers(len(scene.pictures[0])))
        paths += [root / views[view] for views in scene.pictures[start : start + frames]]
    with ThreadPoolExecutor() as pool:  # PIL decodes and resizes without Python's lock
        pictures = list(track(pool.map(partial(read_picture, framing=framing), paths), "pictures", len(paths)))
    return np.stack(pictures).reshape(count, frames, framing.height, framing.width, 3)


def psnr(vae: Vae, clips: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of clips (n, F, H, W, 3) that pass through the VAE (posterior mean)."""
    squares = 0.0
    for clip in clips:
        latents = vae.latents(vae.moments(to_video(clip[None])))
        decoded = np.concatenate(list(vae.decode(latents)), axis=1)[0]
        squares += float(np.square(decoded.astype(np.float64) - clip).sum())
    return float(10 * np.log10(255**2 / (squares / clips.size)))


def latent_spread(vae: Vae, clips: Pixels) -> float:
    """Standard deviation of unscaled posterior samples of clips, about 0: one over it makes latents of unit size."""
    squares, count = 0.0, 0
    for clip in clips:
        mean, log_variance = vae.moments(to_video(clip[None])).double().chunk(2, dim=1)
        squares += float(mean.square().sum() + log_variance.exp().sum())
        count += mean.numel()
    return float(np.sqrt(squares / count))
