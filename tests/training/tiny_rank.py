"""A rank that trains ``TinyNetwork`` on made-up latents; loop, engine and checkpoints are the real ones.

``trouble`` holds ``kill-<rank>-<step>``, ``term-...``, ``usr2-...`` or ``nan-...``, several with commas between: what
happens when that rank asks for the micro-batch of that step.
"""

from __future__ import annotations

import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from magicdrive_core.config.schema import Bucket
from magicdrive_core.data.buckets import BucketSampler
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.experiment.stages import read_job
from magicdrive_core.training.loader import Batch
from tests.training.networks import tiny_network


class NoConditions:
    def map(self, _change: object) -> NoConditions:
        return self


def made_up_batch(
    bucket: int,
    shape: tuple[int, int, int],
    latents: torch.Tensor,
    generator: torch.Generator,
    flow: RectifiedFlow,
) -> Batch:
    """Draw noise levels and noise as the real loader does, and leave the conditions out."""
    conditions: Any = NoConditions()
    t = flow.draw_timesteps(generator, len(latents), shape)
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(bucket, shape, latents, conditions, None, t, noise, generator, 1e9)


class MadeUpLoader:
    """Latents that depend on the clip, drawn again for each micro-batch, as the real loader's samples are."""

    def __init__(self, seed: int, flow: RectifiedFlow, trouble: str = "", order: Path | None = None) -> None:
        self._flow = flow
        self.buckets = [Bucket(resolution="16x16", frames=1, batch=2), Bucket(resolution="16x16", frames=9, batch=1)]
        self._seed, self._trouble = seed, trouble.split(",")
        self._notes = order  # file for the micro-batches in the order of their use

    def start(self, micro_batches: int, groups: int, group: int, steps: int, devices: object) -> None:
        self._groups = groups
        sampler = BucketSampler([7, 5], [b.batch for b in self.buckets], groups, group, self._seed)
        self._order = islice(sampler.stream(micro_batches), steps)
        self._index = micro_batches + group

    def next(self) -> Batch:
        step = self._index // self._groups
        scale = 1.0
        for trouble in self._trouble:
            what, _, when = trouble.partition("-")
            if when == f"{dist.get_rank()}-{step}":
                if what == "nan":
                    scale = float("nan")
                else:
                    os.kill(os.getpid(), SIGNALS[what])
        bucket, clips = next(self._order)
        if self._notes:
            with self._notes.open("a") as file:
                print(json.dumps([self._index, bucket, clips]), file=file)
        rng = np.random.default_rng([self._seed, self._index])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        frames = self.buckets[bucket].frames
        shape = (6, 4, (frames - 1) // 4 + 1, 2, 2)
        fixed = [torch.randn(shape, generator=torch.Generator().manual_seed(100 * bucket + clip)) for clip in clips]
        latents = torch.stack(fixed) + 0.1 * torch.randn(len(clips), *shape, generator=generator)
        self._index += self._groups
        return made_up_batch(bucket, (frames, 16, 16), scale * latents, generator, self._flow)

    def __enter__(self) -> MadeUpLoader:
        return self

    def __exit__(self, *_: object) -> None: ...


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr2": signal.SIGUSR2}


class NeverStop:
    requested = False


def train_tiny(folder: Path, stop: Any, trouble: str = "", preview: Any = None) -> int:
    from magicdrive_core.training.loop import train

    config, plan = read_job(folder)
    loader: Any = MadeUpLoader(3, RectifiedFlow(config.flow.base_pixels), trouble, folder / "order.jsonl")
    network: Any = tiny_network()
    return train(config, plan, network, loader, preview, stop, torch.device("cpu"))
