"""Encoding a data set's clips: what there is to do, and the processes that do it."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.config import parse_size
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Scene
from magicdrive_core.encoders.vae import Vae, latent_shape, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.progress import track

DTYPES = {"float16": torch.float16, "float32": torch.float32}
FRAMES_AT_ONCE = 8  # single frames are encoded in batches of so many


def bucket_name(size: str, frames: int) -> str:
    """``224x400-17``: the folder of a bucket's moments."""
    return f"{size}-{frames}"


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

    @property
    def frames(self) -> int:
        """Frames to be encoded, all views."""
        views = len(self.pictures[0])
        return views * sum(frames * len(starts) for frames, starts in self.starts.items())

    @property
    def pixels(self) -> int:
        """Pixels to be encoded."""
        height, width = parse_size(self.size)
        return self.frames * height * width

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


def plan_scenes(scenes: list[Scene], root: Path, buckets: list[tuple[str, int]], stride: int) -> list[SceneWork]:
    """What is to be encoded of the training scenes, for buckets of (size, frames).

    Raises:
        MagicDriveError: a bucket has no clip at all, because every scene is too short.
    """
    starts: dict[tuple[str, str], dict[int, list[int]]] = {}
    for size, frames in buckets:
        clips = list_clips(scenes, "train", frames, stride)
        if not clips:
            raise MagicDriveError(
                f"no training scene has {frames} frames, which the bucket {size} needs",
                "take the bucket out of training, or add longer scenes",
            )
        for clip in clips:
            starts.setdefault((clip.scene, size), {}).setdefault(frames, []).append(clip.start)
    pictures = {scene.token: [[root / path for path in views] for views in scene.pictures] for scene in scenes}
    return [SceneWork(token, pictures[token], size, by_frames) for (token, size), by_frames in sorted(starts.items())]


def encode_scenes(works: list[SceneWork], settings: EncoderSettings, folder: Path) -> dict[str, float]:
    """Writes the moments of every clip below ``folder``, on the GPU if there is one, else on all cores.

    Returns:
        The standard deviation of each bucket's scaled latents (means over channels; 1 is right for diffusion).

    Raises:
        MagicDriveError: a picture is missing or broken, or a process was killed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = min(len(os.sched_getaffinity(0)), len(works)) if device == "cpu" else 1
    if workers == 1:
        _load_vae(settings, device)
        _print_estimate(works, settings, _seconds_per_pixel(works[0]))
        parts = [_encode_scene(work, settings.dtype, folder) for work in track(works, "VAE moments")]
    else:
        parts = _encode_in_processes(works, settings, folder, workers)
    sums: dict[str, np.ndarray] = {}
    for part in parts:  # in the order of the works, so that rounding is the same every time
        for bucket, values in part.items():
            sums[bucket] = sums.get(bucket, np.zeros(3)) + values
    factor = settings.scaling_factor
    return {name: factor * float(np.sqrt(s / n - (m / n) ** 2)) for name, (n, m, s) in sorted(sums.items())}


def _encode_in_processes(
    works: list[SceneWork], settings: EncoderSettings, folder: Path, workers: int
) -> list[dict[str, np.ndarray]]:
    """One process of one thread a core: measured on 2 cores, faster than one process of two threads."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_load_vae, initargs=(settings, "cpu")) as pool:
            seconds_per_pixel = pool.submit(_seconds_per_pixel, works[0]).result()
            _print_estimate(works, settings, seconds_per_pixel / workers)
            futures = [pool.submit(_encode_scene, work, settings.dtype, folder) for work in works]
            try:
                for future in track(as_completed(futures), "VAE moments", len(futures)):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]
    except BrokenProcessPool:
        raise MagicDriveError(
            "a process that encoded clips was killed", "most likely the memory is full: close other programs"
        ) from None


_vae: Vae  # of this process


def _load_vae(settings: EncoderSettings, device: str) -> None:
    global _vae
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    _vae = Vae.load(
        settings.folder,
        scaling_factor=settings.scaling_factor,
        chunk_frames=settings.chunk_frames,
        device=device,
    )


def _encode_scene(work: SceneWork, dtype: str, folder: Path) -> dict[str, np.ndarray]:
    """Writes the moments of one scene at one size; returns count, sum and sum of squares of each bucket's latents."""
    framing = Framing(*parse_size(work.size))
    moments: dict[int, list[Tensor]] = {frames: [] for frames in work.starts}
    for view in range(len(work.pictures[0])):  # memory holds one view's pictures
        read = lru_cache(maxsize=None)(lambda frame, view=view: read_picture(work.pictures[frame][view], framing))
        for frames, starts in work.starts.items():
            batch = max(1, FRAMES_AT_ONCE // frames)
            parts = []
            for first in range(0, len(starts), batch):
                clips = [[read(frame) for frame in range(s, s + frames)] for s in starts[first : first + batch]]
                parts.append(_vae.moments(to_video(np.array(clips)), micro_batch=batch).to(DTYPES[dtype]))
            moments[frames].append(torch.cat(parts))
    sums = {}
    for frames, starts in work.starts.items():
        stacked = torch.stack(moments[frames], dim=1)  # n, V, 2C, T, h, w
        name = bucket_name(work.size, frames)
        tensors = {"moments": stacked, "starts": torch.tensor(starts)}
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, folder / name / f"{work.scene}.safetensors")
        mean, log_variance = stacked.double().chunk(2, dim=2)
        squares = mean.square().sum() + log_variance.exp().sum()
        sums[name] = np.array([mean.numel(), mean.sum().item(), squares.item()])
    return sums


def _seconds_per_pixel(work: SceneWork) -> float:
    """Time to read and encode one clip of the work's shortest length, after one to warm up."""
    framing = Framing(*parse_size(work.size))
    frames = min(work.starts)
    for _ in range(2):
        begin = time.perf_counter()
        clip = np.array([[read_picture(work.pictures[frame][0], framing) for frame in range(frames)]])
        _vae.moments(to_video(clip))
        seconds = time.perf_counter() - begin
    return seconds / (frames * framing.height * framing.width)


def _print_estimate(works: list[SceneWork], settings: EncoderSettings, seconds_per_pixel: float) -> None:
    size = sum(work.bytes(settings) for work in works)
    minutes = seconds_per_pixel * sum(work.pixels for work in works) / 60
    frames = sum(work.frames for work in works)
    Console(stderr=True).print(
        f"latents: {frames:,} frames of {len({work.scene for work in works})} scenes,"
        f" {size / 1e6:,.0f} MB, about {minutes:,.1f} minutes"
    )
