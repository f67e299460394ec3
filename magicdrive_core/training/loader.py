"""Work that is done ahead by a thread, in order, as far as a number of bytes allows."""

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
from magicdrive_core.diffusion.frame_masks import draw_masks
from magicdrive_core.encoders.caches import LatentCache, LiveLatents, open_text
from magicdrive_core.encoders.vae import sample_moments
from magicdrive_core.experiment.stages import bucket_clips
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.flops import training_flops
from magicdrive_core.model.inputs import Conditions, collate
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.training.budget import plan_budget
from magicdrive_core.training.live_encoding import SharedEncoding
from magicdrive_core.utils.files import read_json

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Results of jobs in their order; the next ones are made while the last one is used.

    One job is always done ahead, however large; more as long as all that waits stays within the budget.

    Args:
        jobs: (bytes of the result, the job).
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
        """Bytes of the results that wait, and of the one that is being made."""
        with self._change:
            return self._held

    def next(self) -> T:
        """The next result; raises what its job raised, and StopIteration after the last one."""
        with self._change:
            self._change.wait_for(lambda: self._done)
            size, result = self._done.popleft()
            self._held -= size
            self._change.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        """Ends the thread after the job that it is at; what waits is dropped."""
        with self._change:
            self._stopped = True
            self._done.clear()
            self._change.notify_all()
        self._thread.join()

    def _may_begin(self, size: int) -> bool:
        return self._stopped or not self._held or self._held + size <= self._budget

    def _work(self) -> None:
        for size, job in self._jobs:
            with self._change:
                self._change.wait_for(partial(self._may_begin, size))
                if self._stopped:
                    return
                self._held += size
            result: T | BaseException
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
                result = error
            with self._change:
                self._done.append((size, result))
                self._change.notify_all()
            if isinstance(result, BaseException):
                return
        with self._change:
            self._done.append((0, StopIteration()))
            self._change.notify_all()


# Micro-batches for a group of ranks: conditions, latents and masks of clips of one bucket, prepared ahead.
#
# Every random number of a micro-batch comes from generators seeded with (seed, stage, index of the micro-batch among
# all groups'). So a resumed training draws what an uninterrupted one would, on any number of ranks, no two groups
# draw the same (golden notes, oddity 12), and the ranks that share a clip draw all the same.


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU; latents that several devices encoded are on the device."""

    bucket: int  # index into ``Loader.buckets``
    shape: tuple[int, int, int]  # frames, height, width of the video
    latents: Tensor  # B, V, C, T, h, w: clean
    conditions: Conditions
    mask: Tensor | None  # B, T bool: True = noisy; None: all noisy
    generator: torch.Generator  # for time and noise
    flops: float  # that the network takes for it, forward and backward


class Loader:
    """Yields the micro-batches of a group; the next ones are prepared in a thread, as memory allows.

    Raises:
        MagicDriveError: a cache is missing or stale, or the micro-batches do not fit into memory.
    """

    def __init__(self, config: Config, stage: Stage, project: Path = Path()) -> None:
        self._config, self._stage, self._settings = config, stage, config.training.stage(stage)
        artifacts = project / "artifacts"
        scenes = read_scenes(artifacts / "infos")
        outlines = [SceneHeader.of(scene) for scene in scenes]
        self._scenes = ScenesByToken(scenes, outlines)
        pairs = [(bucket, bucket_clips(config, stage, bucket, outlines)) for bucket in self._settings.buckets]
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
        self._prefetcher: Prefetcher[Batch] | None = None
        self._shared: SharedEncoding | None = None

    def start(
        self,
        micro_batches: int,
        groups: int,
        group: int,
        steps: int | None = None,
        sequence_group: RankGroup | None = None,
    ) -> None:
        """Begins after so many micro-batches of all groups together.

        Args:
            micro_batches: of all groups together, that were used before.
            groups: that each take a micro-batch a step.
            group: this one.
            steps: micro-batches of this group that will be asked for, so that no more are prepared; None: no end.
            sequence_group: the ranks that share this group's clips; None: this one alone.
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
        places = count(micro_batches + group, groups)
        self._prefetcher = Prefetcher(
            (
                (sizes[bucket], partial(self._prepare, bucket, clips, place))
                for place, (bucket, clips) in islice(zip(places, sampler.stream(micro_batches), strict=False), steps)
            ),
            self.budget.waiting,
        )

    def next(self) -> Batch:
        """The next micro-batch. All devices that share clips make this call, in one order."""
        assert self._prefetcher is not None, "start comes first"
        batch = self._prefetcher.next()
        if self._shared is None:
            return batch
        return replace(batch, latents=self._shared.hand_out(batch.latents))

    @property
    def held(self) -> int:
        """Bytes of micro-batches that wait and of maps that are kept."""
        return self._maps.held + (self._prefetcher.held if self._prefetcher else 0)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._prefetcher:
            self._prefetcher.stop()

    def _prepare(self, bucket: int, indices: list[int], micro_batch: int) -> Batch:
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
        simulated = [n for n in self._settings.simulate_sizes if n >= self._config.cluster.sequence_parallel]
        return Batch(
            bucket,
            (clips[0].frames, *parse_size(size)),
            latents,
            replace(conditions, pad_patches=int(rng.choice(simulated)) if simulated else None),
            None if mask.all() else torch.from_numpy(mask),
            generator,
            training_flops(
                self._sizes, len(clips), clips[0].frames, latents.shape[3:], conditions.box_classes.shape[-1]
            ),
        )

    def _conditions(
        self, clips: list[Clip], size: str, rng: np.random.Generator, generator: torch.Generator
    ) -> Conditions:
        """The clips' conditions, changed as training changes them (golden notes, section 1)."""
        training = self._config.training
        told = [self._told(clip, size, rng) for clip in clips]
        text = [self._text.features(conditions.caption) for conditions in told]
        keep = torch.from_numpy(rng.random(len(clips)) >= training.drop_condition)
        conditions = collate(told, text, self._config.text.max_tokens, keep)
        keep_frame = [drop_frames(clip.frames, training.drop_frame, rng) for clip in clips]
        conditions = replace(conditions, keep_frame=torch.from_numpy(np.stack(keep_frame)))
        if self._stage == "stage1":
            return conditions
        slots = conditions.box_classes.shape[-1]
        latent = torch.randn(len(clips), slots, self._config.model.width, generator=generator)
        return replace(conditions, box_latent=latent)

    def _told(self, clip: Clip, size: str, rng: np.random.Generator) -> ClipConditions:
        config, scene = self._config, self._scenes[clip.scene]
        bits = self._maps.of_clip(scene, clip, size)
        told = clip_conditions(scene, clip, size, bits, published=config.published)
        if self._settings.balance and weather_groups(scene.description, published=config.published) == ["none"]:
            told = replace(told, caption=caption(scene, say_daytime=True))
        told = add_boxes(told, config.training.add_boxes, rng)
        return hide_boxes(told, anchor_frames(scene, clip, published=config.published), config.training.hide_boxes, rng)
