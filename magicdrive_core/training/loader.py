"""The micro-batches of training: drawn, put together by a thread ahead of their use, and copied to the device.

Every random number of a micro-batch comes from generators seeded with (seed, stage, index of the micro-batch among
those of all groups). So a resumed run draws what an uninterrupted one would, on any number of ranks; no two groups draw
the same (golden notes, oddity 12); and the ranks that share a clip all draw the same.

B samples, V views, C channels, T latent frames, h w latents.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from magicdrive_core.config.schema import STAGES, Bucket, Config, Stage, parse_size
from magicdrive_core.data.buckets import BucketSampler, relative_cost
from magicdrive_core.data.clips import caption, weather_groups
from magicdrive_core.data.conditions import add_boxes, anchor_frames, clip_conditions, drop_frames, hide_boxes
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import Clip, ClipConditions, SceneHeader
from magicdrive_core.data.scene_store import ScenesByToken
from magicdrive_core.device import this_device
from magicdrive_core.diffusion.frame_masks import draw_masks
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.encoders.caches import LatentCache, LiveLatents, open_text
from magicdrive_core.encoders.vae import sample_moments
from magicdrive_core.experiment.stages import bucket_clips
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.flops import training_flops
from magicdrive_core.model.inputs import Conditions, collate
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.training.budget import plan_budget
from magicdrive_core.utils.files import read_json

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One micro-batch: clips of one bucket with their conditions.

    Attributes:
        bucket: index into ``Loader.buckets``.
        shape: frames of the video, height and width in pixels.
        latents: (B, V, C, T, h, w), clean.
        conditions: what the clips are conditioned on, changed as training changes it.
        mask: (B, T) bool, True for noisy frames; None where all are.
        t: (B) noise levels in [0, 1000], fp32.
        noise: shaped like ``latents``, the end of the path.
        generator: CPU generator that drew the noise levels, then the noise; it draws what a pass needs beyond them.
        flops: floating-point operations of the network, forward and backward.
    """

    bucket: int
    shape: tuple[int, int, int]
    latents: Tensor
    conditions: Conditions
    mask: Tensor | None
    t: Tensor
    noise: Tensor
    generator: torch.Generator
    flops: float

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to the device run beside its computation.

        Returns:
            A batch of the same shapes; tensors that are on a device already are left there.
        """
        return self._map(_pin)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the copy may still be running, and the device waits for it by itself.

        Args:
            device: where all tensors go; the generator stays on the CPU.

        Returns:
            A batch of the same shapes. The copies of tensors that were expanded over the views are expanded again.
        """
        return self._map(partial(_move, device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        mask = None if self.mask is None else change(self.mask)
        return replace(
            self,
            latents=change(self.latents),
            conditions=self.conditions.map(change),
            mask=mask,
            t=change(self.t),
            noise=change(self.noise),
        )


def _pin(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    return _without_copies(tensor).pin_memory().expand(tensor.shape)


def _move(device: torch.device, tensor: Tensor) -> Tensor:
    return _without_copies(tensor).to(device, non_blocking=True).expand(tensor.shape)


def _without_copies(tensor: Tensor) -> Tensor:
    """Undo ``expand``: boxes are the same for all views, and need to be copied once."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


class Loader:
    """Yields the micro-batches of a group of ranks; the next ones are prepared in a thread, as memory allows.

    A context manager; it is used after ``start``.

    Args:
        config: buckets, masks, what is dropped and hidden, caches or live encoding.
        stage: to be trained.
        project: the project's folder.

    Raises:
        MagicDriveError: a cache is missing or stale, or the micro-batches do not fit into memory.
    """

    def __init__(self, config: Config, stage: Stage, project: Path = Path()) -> None:
        self._config, self._stage, self._settings = config, stage, config.training.stage(stage)
        artifacts = project / "artifacts"
        scenes = read_scenes(artifacts / "infos")
        headers = [SceneHeader.of(scene) for scene in scenes]
        self._scenes = ScenesByToken(scenes, headers)
        pairs = [(bucket, bucket_clips(config, stage, bucket, headers)) for bucket in self._settings.buckets]
        self.buckets: list[Bucket] = [bucket for bucket, clips in pairs if clips]
        self._clips = [clips for _, clips in pairs if clips]
        self.budget = plan_budget(config, stage, project)
        self._maps = BevMaps(config, project, hold=self.budget.maps)
        self._text = open_text(config, project)
        self._latents: LatentCache | LiveLatents
        if config.latents.live:
            self._latents = LiveLatents(config, project, self._scenes)
        else:
            self._latents = LatentCache(artifacts / "latents", config)
        encoders = read_json(artifacts / "encoders/encoders.json")
        self._scale: float = encoders["vae"]["scaling_factor"]
        self._sizes = NetworkConfig.from_settings(
            config.model,
            latent_channels=encoders["vae"]["latent_channels"],
            text_width=encoders["text"]["width"],
            text_tokens=config.text.max_tokens,
            stage=stage,
            published=config.published,
        )
        self._flow = RectifiedFlow(config.flow.base_pixels)
        self._pin = this_device().type != "cpu"
        self._prefetcher: Prefetcher[Batch] | None = None
        self._shared: SharedEncoding | None = None

    def start(
        self,
        micro_batches: int,
        groups: int,
        group: int,
        limit: int | None = None,
        sequence_group: RankGroup | None = None,
    ) -> None:
        """Start to prepare micro-batches.

        Args:
            micro_batches: how many all groups together have already used.
            groups: number of groups; each takes every ``groups``-th micro-batch.
            group: number of this one.
            limit: number of micro-batches that this group will ask for, so that no more are prepared; None: no limit.
            sequence_group: the ranks that share this group's clips; None where this rank has them alone.
        """
        if sequence_group is not None and isinstance(self._latents, LiveLatents):
            self._shared = SharedEncoding(self._latents, sequence_group)
        sampler = BucketSampler(
            [len(clips) for clips in self._clips],
            [bucket.batch for bucket in self.buckets],
            ranks=groups,
            rank=group,
            seed=self._settings.seed,
            costs=[
                relative_cost(
                    bucket.resolution,
                    bucket.frames,
                    bucket.batch,
                    self._config.model.width,
                    self._config.text.max_tokens,
                )
                for bucket in self.buckets
            ],
            group=self._config.training.pair_ranks,
        )
        sizes = [self.budget.batches[bucket.name] for bucket in self.buckets]
        indices = count(micro_batches + group, groups)  # of this group's micro-batches among all groups'
        drawn = islice(zip(indices, sampler.stream(micro_batches), strict=False), limit)
        self._prefetcher = Prefetcher(
            ((sizes[bucket], partial(self._prepare, bucket, clips, index)) for index, (bucket, clips) in drawn),
            self.budget.waiting,
        )

    def next(self) -> Batch:
        """Return the next micro-batch. All ranks that share clips call this in the same order.

        Returns:
            The micro-batch on the host, in page-locked memory where there is a device. Latents that ranks encoded
            together are on the device.

        Raises:
            StopIteration: all ``steps`` micro-batches were returned.
            Exception: whatever the preparation of this micro-batch raised.
        """
        assert self._prefetcher is not None, "start comes first"
        batch = self._prefetcher.next()
        if self._shared is None:
            return batch
        return replace(batch, latents=self._shared.gather(batch.latents))

    @property
    def held(self) -> int:
        """Bytes of the micro-batches that wait and of the maps that are kept."""
        return self._maps.held + (self._prefetcher.held if self._prefetcher else 0)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._prefetcher:
            self._prefetcher.stop()

    def _prepare(self, bucket: int, indices: list[int], micro_batch: int) -> Batch:
        """Put a micro-batch together, in the thread; the order of the draws is part of the result."""
        rng = np.random.default_rng([self._settings.seed, STAGES.index(self._stage), micro_batch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        size = self.buckets[bucket].resolution
        clips = [self._clips[bucket][index] for index in indices]
        if self._shared is not None:
            moments = self._shared.moments(size, clips)
        else:
            moments = torch.stack([self._latents.moments(size, clip) for clip in clips])
        latents = self._scale * sample_moments(moments.float(), generator)
        mask = draw_masks(self._settings.mask_ratios, len(clips), latents.shape[3], rng)
        conditions = self._conditions(clips, size, rng, generator)
        shape = (clips[0].frames, *parse_size(size))
        t = self._flow.draw_timesteps(generator, len(clips), shape)  # on the CPU: the same on every device
        noise = torch.randn(latents.shape, generator=generator)
        ranks = self._config.cluster.sequence_parallel_of(self._stage)
        simulated = [n for n in self._settings.simulate_sizes if n >= ranks]
        batch = Batch(
            bucket,
            shape,
            latents,
            replace(conditions, pad_patches=int(rng.choice(simulated)) if simulated else None),
            None if mask.all() else torch.from_numpy(mask),
            t,
            noise,
            generator,
            training_flops(
                self._sizes, len(clips), clips[0].frames, latents.shape[3:], conditions.box_classes.shape[-1]
            ),
        )
        return batch.pinned() if self._pin else batch

    def _conditions(
        self, clips: list[Clip], size: str, rng: np.random.Generator, generator: torch.Generator
    ) -> Conditions:
        """Read the conditions of clips and change them as training changes them (golden notes, section 1)."""
        training = self._config.training
        read = [self._clip_conditions(clip, size, rng) for clip in clips]
        text = [self._text.features(conditions.caption) for conditions in read]
        keep = torch.from_numpy(rng.random(len(clips)) >= training.drop_condition)
        conditions = collate(read, text, self._config.text.max_tokens, keep)
        keep_frame = [drop_frames(clip.frames, training.drop_frame, rng) for clip in clips]
        conditions = replace(conditions, keep_frame=torch.from_numpy(np.stack(keep_frame)))
        if self._stage == "stage1":
            return conditions
        slots = conditions.box_classes.shape[-1]
        latent = torch.randn(len(clips), slots, self._config.model.width, generator=generator)
        return replace(conditions, box_latent=latent)

    def _clip_conditions(self, clip: Clip, size: str, rng: np.random.Generator) -> ClipConditions:
        config, scene = self._config, self._scenes[clip.scene]
        bits = self._maps.of_clip(scene, clip, size)
        conditions = clip_conditions(scene, clip, size, bits, published=config.published)
        if self._settings.balance and weather_groups(scene.description, published=config.published) == ["none"]:
            conditions = replace(conditions, caption=caption(scene, say_daytime=True))
        conditions = add_boxes(conditions, config.training.add_boxes, rng)
        anchors = anchor_frames(scene, clip, published=config.published)
        return hide_boxes(conditions, anchors, config.training.hide_boxes, rng)


class Prefetcher(Generic[T]):
    """Runs jobs in a thread, in their order, while earlier results are used.

    One result always waits, however large; more as long as all that wait stay within the budget. A thread and not
    processes: most of a job is NumPy and torch, which release the interpreter's lock, and nothing has to be pickled.

    Args:
        jobs: pairs (bytes of the result, the job).
        budget: bytes of results that may wait.
    """

    def __init__(self, jobs: Iterator[tuple[int, Callable[[], T]]], budget: int) -> None:
        self._jobs, self._budget = jobs, budget
        self._done: deque[tuple[int, T | BaseException]] = deque()
        self._held = 0
        self._stopped = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Bytes of the results that wait and of the one that is being made."""
        with self._change:
            return self._held

    def next(self) -> T:
        """Wait for the next result and return it.

        Returns:
            The result of the first job whose result was not returned yet.

        Raises:
            StopIteration: there are no more jobs.
            BaseException: whatever this job raised; no further job is run.
        """
        with self._change:
            self._change.wait_for(lambda: self._done)
            size, result = self._done.popleft()
            self._held -= size
            self._change.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        """End the thread after its present job, and drop the results that wait."""
        with self._change:
            self._stopped = True
            self._done.clear()
            self._change.notify_all()
        self._thread.join()

    def _may_start(self, size: int) -> bool:
        return self._stopped or not self._held or self._held + size <= self._budget

    def _work(self) -> None:
        for size, job in self._jobs:
            with self._change:
                self._change.wait_for(partial(self._may_start, size))
                if self._stopped:
                    return
                self._held += size
            result: T | BaseException
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - ``next`` raises it
                result = error
            with self._change:
                self._done.append((size, result))
                self._change.notify_all()
            if isinstance(result, BaseException):
                return
        with self._change:
            self._done.append((0, StopIteration()))
            self._change.notify_all()


class SharedEncoding:
    """Live encoding by ranks that share clips: each encodes some of the views, then all receive all.

    Encoding needs no other rank, so that the prefetcher's thread may do it; ``gather`` is a collective.

    Args:
        latents: encodes on this rank's device.
        group: the ranks; micro-batches and random numbers are the same on all of them.
    """

    def __init__(self, latents: LiveLatents, group: RankGroup) -> None:
        self._latents, self._group = latents, group

    def moments(self, size: str, clips: list[Clip]) -> Tensor:
        """Encode this rank's views.

        Args:
            size: height and width of the videos in pixels, such as "224x400".
            clips: B clips of equal length.

        Returns:
            (B, V, 2C, T, h, w) posterior mean and log-variance; zeros for views that other ranks encode.
        """
        own = self._own(len(clips) * len(VIEWS))
        moments = []
        for index, clip in enumerate(clips):
            views = [video % len(VIEWS) for video in own if video // len(VIEWS) == index]
            moments.append(self._latents.moments(size, clip, views))
        return torch.stack(moments)

    def gather(self, latents: Tensor) -> Tensor:
        """Exchange latents, so that every rank has those of all views. Collective in the group.

        Args:
            latents: (B, V, C, T, h, w), of which only this rank's views are valid.

        Returns:
            (B, V, C, T, h, w) on this rank's device, all valid and the same on all ranks.
        """
        videos = latents.flatten(0, 1)
        own = self._own(len(videos))
        part = torch.zeros(self._share(len(videos)), *videos.shape[1:], device=this_device())
        part[: len(own)] = videos[own.start : own.stop]
        return self._group.all_gather(part).flatten(0, 1)[: len(videos)].view(latents.shape)

    def _share(self, videos: int) -> int:
        return -(-videos // self._group.size)

    def _own(self, videos: int) -> range:
        """Return this rank's range of all clips' views in a row; the last ranks may have fewer, or none."""
        share = self._share(videos)
        return range(videos)[self._group.rank * share : (self._group.rank + 1) * share]
