"""Encoding the clips of training scenes to VAE moments: what there is to encode, and the work on a GPU or all cores.

The unit of work is one scene at one size; its files appear when they are complete, so that an interrupted run continues
with the next scene. A clip that equals the start of a longer one is copied from it, not encoded again.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from magicdrive_core.config.schema import Bucket, bucket_name, parse_size
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import Scene, SceneHeader
from magicdrive_core.device import kind
from magicdrive_core.encoders.vae import Vae, latent_shape, to_video
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import Framing
from magicdrive_core.utils.files import atomic_file, file_name
from magicdrive_core.utils.process_pool import end_with_parent
from magicdrive_core.utils.progress import announce, track

DTYPES = {"float16": torch.float16, "float32": torch.float32}
FRAMES_AT_ONCE = 8  # single frames in a batch


def is_prefix(frames: int, longer: int, chunk_frames: int | None) -> bool:
    """Tells whether a clip's latents are the first ones of a longer clip that starts at the same frame.

    The encoder is causal, and its norms see one chunk at a time. So this holds if the chunks of both clips have the
    same lengths; the first chunk takes the frames that do not fill one.

    Args:
        frames: frames of the clip.
        longer: frames of the longer clip.
        chunk_frames: frames of an encoder chunk; None: the whole clip.

    Returns:
        True where the shorter clip's latents can be copied from the longer one's.
    """
    return chunk_frames is not None and chunk_frames <= frames and (longer - frames) % chunk_frames == 0


@dataclass(frozen=True)
class EncoderSettings:
    """The VAE and how it is used.

    Attributes:
        folder: from_pretrained folder of the VAE.
        scaling_factor: latents = sample * factor.
        latent_channels: C.
        chunk_frames: frames of an encoder chunk; None: the whole clip.
        dtype: data type of the stored moments, a key of ``DTYPES``.
    """

    folder: str
    scaling_factor: float
    latent_channels: int
    chunk_frames: int | None
    dtype: str


@dataclass(frozen=True)
class SceneWork:
    """All clips of one scene at one size; pictures are read once for clips of all lengths.

    Attributes:
        scene: scene token.
        pictures: picture files, F frames of V views.
        size: height and width of the video, such as "224x400".
        starts: first frames of the clips, by their number of frames.
    """

    scene: str
    pictures: list[list[Path]]
    size: str
    starts: dict[int, list[int]]

    def encoded(self, chunk_frames: int | None) -> dict[int, list[int]]:
        """Selects the clips that have to be encoded; the others are prefixes of longer clips.

        Args:
            chunk_frames: frames of an encoder chunk; None: the whole clip.

        Returns:
            First frames of the clips by their number of frames, the longest clips first.
        """
        left: dict[int, list[int]] = {}
        for frames, starts in sorted(self.starts.items(), reverse=True):
            longer = {start for n in left if is_prefix(frames, n, chunk_frames) for start in left[n]}
            left[frames] = [start for start in starts if start not in longer]
        return left

    def frames(self, chunk_frames: int | None) -> int:
        """Counts the frames that have to be encoded, over all views.

        Args:
            chunk_frames: frames of an encoder chunk; None: the whole clip.

        Returns:
            Number of frames; a frame counts once for each clip that it is encoded in.
        """
        views = len(self.pictures[0])
        return views * sum(frames * len(starts) for frames, starts in self.encoded(chunk_frames).items())

    def bytes(self, settings: EncoderSettings) -> int:
        """Computes the size of the moments of all clips in the cache.

        Args:
            settings: latent channels and dtype are read.

        Returns:
            Bytes, without the files' headers.
        """
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
    """Lists the clips of all training scenes; clips that several buckets share are listed once.

    A bucket that is longer than every scene has no clips; training skips it with a warning.

    Args:
        scenes: all scenes of the infos.
        root: data root of the pictures.
        buckets: buckets of all stages.
        stride: frames between the starts of two clips.

    Returns:
        The work of each scene at each size, sorted by scene token and size.

    Raises:
        MagicDriveError: no bucket has a clip.
    """
    starts: dict[tuple[str, str], dict[int, set[int]]] = {}
    outlines = [SceneHeader.of(scene) for scene in scenes]
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


def encode_scenes(
    works: list[SceneWork], settings: EncoderSettings, folder: Path, *, scaled: bool = False
) -> dict[str, float]:
    """Writes the moments of every clip, on the GPU if there is one, else in a process on each core.

    Args:
        works: scenes and clips to encode.
        settings: the VAE and how it is used.
        folder: folder of the cache.
        scaled: JPEG's scaled decoding, see ``read_picture``.

    Returns:
        The standard deviation of each bucket's scaled latents over all channels; diffusion expects about 1.

    Raises:
        MagicDriveError: a picture is missing or broken, or a process was killed.
    """
    device = kind()
    workers = min(len(os.sched_getaffinity(0)), len(works)) if device == "cpu" else 1
    if workers == 1:
        _load_vae(settings, device)
        _announce_work(works, settings, folder, _seconds_per_pixel(works[0], scaled))
        with closing(track(works, "VAE moments")) as rest:  # an error is shown below the bar
            parts = [_encode_scene(work, settings.dtype, folder, scaled) for work in rest]
    else:
        parts = _encode_in_processes(works, settings, folder, workers, scaled)
    sums: dict[str, np.ndarray] = {}
    for part in parts:  # in the order of the works, so that the sums are rounded the same way in every run
        for bucket, values in part.items():
            sums[bucket] = sums.get(bucket, np.zeros(3)) + values
    factor = settings.scaling_factor
    return {name: factor * float(np.sqrt(s / n - (m / n) ** 2)) for name, (n, m, s) in sorted(sums.items())}


def _encode_in_processes(
    works: list[SceneWork], settings: EncoderSettings, folder: Path, workers: int, scaled: bool
) -> list[dict[str, np.ndarray]]:
    """Encodes in one single-threaded process on each core, which is faster than one process with many threads."""
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    try:
        with ProcessPoolExecutor(workers, context, initializer=_load_vae, initargs=(settings, "cpu")) as pool:
            seconds_per_pixel = pool.submit(_seconds_per_pixel, works[0], scaled).result()
            _announce_work(works, settings, folder, seconds_per_pixel / workers)
            futures = [pool.submit(_encode_scene, work, settings.dtype, folder, scaled) for work in works]
            try:
                with closing(track(as_completed(futures), "VAE moments", len(futures))) as done:
                    for future in done:
                        future.result()
            except BaseException:
                # Leaving the pool would wait minutes for scenes that are being encoded; their files appear only when
                # they are complete.
                for process in set(multiprocessing.active_children()) - set(others):
                    process.terminate()
                raise
            return [future.result() for future in futures]
    except BrokenProcessPool:
        raise MagicDriveError(
            "a process that encoded clips was killed", "the memory is probably full: close other programs"
        ) from None


_vae: Vae  # of this process


def _load_vae(settings: EncoderSettings, device: str) -> None:
    """Loads the VAE of this process."""
    global _vae
    if multiprocessing.parent_process() is not None:
        end_with_parent()
        torch.set_num_threads(1)
    _vae = Vae.load(
        settings.folder,
        scaling_factor=settings.scaling_factor,
        chunk_frames=settings.chunk_frames,
        device=device,
    )


def _paths(work: SceneWork, folder: Path) -> dict[int, Path]:
    """Returns the files of a scene's clips, by number of frames."""
    return {
        frames: folder / bucket_name(work.size, frames) / f"{file_name(work.scene)}.safetensors"
        for frames in work.starts
    }


def _is_done(work: SceneWork, folder: Path) -> bool:
    """Tells whether an earlier, interrupted run encoded the scene."""
    return all(path.is_file() for path in _paths(work, folder).values())


def _encode_scene(work: SceneWork, dtype: str, folder: Path, scaled: bool) -> dict[str, np.ndarray]:
    """Writes the moments of one scene at one size, unless an earlier run did.

    Returns:
        Count, sum and sum of squares of each bucket's latents.
    """
    paths = _paths(work, folder)
    if _is_done(work, folder):
        return {path.parent.name: _sums(load_file(path)["moments"]) for path in paths.values()}
    framing = Framing(*parse_size(work.size))
    views = []
    for view in range(len(work.pictures[0])):  # one view at a time, to hold the pictures of one view only

        @cache
        def read(frame: int, view: int = view) -> np.ndarray:
            return read_picture(work.pictures[frame][view], framing, scaled=scaled)

        views.append(_encode_view(work, read))
    sums = {}
    for frames, starts in work.starts.items():
        clips = [torch.stack([moments[frames, start] for moments in views]) for start in starts]
        stacked = torch.stack(clips).to(DTYPES[dtype])  # n, V, 2C, T, h, w
        with atomic_file(paths[frames]) as partial:
            save_file({"moments": stacked, "starts": torch.tensor(starts)}, partial)
        sums[paths[frames].parent.name] = _sums(stacked)
    return sums


def _sums(moments: Tensor) -> np.ndarray:
    """Returns count, sum and sum of squares of the latents with the given moments (n, V, 2C, T, h, w)."""
    mean, log_variance = moments.double().chunk(2, dim=2)
    squares = mean.square().sum() + log_variance.exp().sum()
    return np.array([mean.numel(), mean.sum().item(), squares.item()])


def _encode_view(work: SceneWork, read: Callable[[int], np.ndarray]) -> dict[tuple[int, int], Tensor]:
    """Encodes the clips of one view.

    Args:
        work: scene and clips.
        read: returns the picture (H, W, 3) of a frame.

    Returns:
        Moments (2C, T, h, w) by number of frames and first frame.
    """
    chunk = _vae.chunk_frames
    moments: dict[tuple[int, int], Tensor] = {}
    for frames, starts in work.encoded(chunk).items():
        batch = max(1, FRAMES_AT_ONCE // frames)
        for first in range(0, len(starts), batch):
            now = starts[first : first + batch]
            clips = np.array([[read(start + frame) for frame in range(frames)] for start in now])
            encoded = _vae.moments(to_video(clips), micro_batch=batch)
            moments |= {(frames, start): one for start, one in zip(now, encoded, strict=True)}
    for frames, starts in work.starts.items():
        length = latent_shape(frames, *parse_size(work.size))[0]
        for start in starts:
            if (frames, start) not in moments:
                longer = next(n for n, s in moments if s == start and n > frames and is_prefix(frames, n, chunk))
                moments[frames, start] = moments[longer, start][:, :length]
    return moments


def _seconds_per_pixel(work: SceneWork, scaled: bool) -> float:
    """Measures the seconds for a pixel of reading and encoding one clip of the shortest length, after a warm-up."""
    framing = Framing(*parse_size(work.size))
    frames = min(work.starts)
    for _ in range(2):
        begin = time.perf_counter()
        clip = np.array([[read_picture(work.pictures[frame][0], framing, scaled=scaled) for frame in range(frames)]])
        _vae.moments(to_video(clip))
        seconds = time.perf_counter() - begin
    return seconds / (frames * framing.height * framing.width)


def _announce_work(works: list[SceneWork], settings: EncoderSettings, folder: Path, seconds_per_pixel: float) -> None:
    """Announces size and duration of what is left to encode."""
    left = [work for work in works if not _is_done(work, folder)]
    frames = [work.frames(settings.chunk_frames) for work in left]
    pixels = sum(n * int(np.prod(parse_size(work.size))) for n, work in zip(frames, left, strict=True))
    amount = f"{sum(frames):,} frames of {len({work.scene for work in left})} scenes"
    announce("latents", amount, sum(work.bytes(settings) for work in left), seconds_per_pixel * pixels)
