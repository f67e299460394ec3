"""What the ranks tell each other at every step: losses, sizes, faults, and whether one of them was asked to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.device import this_device
from magicdrive_core.model.parallel import DeviceGroup, OneDevice
from magicdrive_core.training.loader import Batch
from magicdrive_core.training.resources import DeviceMemory, fullest
from magicdrive_core.training.strategy import GradientCheck

BINS = 10  # of the noise level, equally wide


class Stop(Protocol):
    """Says whether this rank was asked to stop."""

    @property
    def asked(self) -> bool: ...


@dataclass(frozen=True)
class MicroBatchFacts:
    """What a rank knows of a micro-batch after its passes."""

    loss: float
    by_noise: list[tuple[int, float]]  # of each sample: bin of its noise level, loss
    bucket: int
    clips: int
    tokens: int  # latent positions of the network's input, all views
    flops: float  # of the network, forward and backward

    @classmethod
    def of(cls, losses: Tensor, t: Tensor, batch: Batch) -> MicroBatchFacts:
        """Of ``losses`` (B) at noise levels ``t`` (B)."""
        _, views, _, frames, height, width = batch.latents.shape
        clips = len(batch.latents)
        bins = [min(BINS - 1, int(level * BINS / 1000)) for level in t.tolist()]
        return cls(
            loss=losses.mean().item(),
            by_noise=list(zip(bins, losses.tolist(), strict=True)),
            bucket=batch.bucket,
            clips=clips,
            tokens=clips * views * frames * math.ceil(height / 2) * math.ceil(width / 2),
            flops=batch.flops,
        )


@dataclass(frozen=True)
class RankFacts:
    """What every rank tells all others at each step."""

    micro_batches: list[MicroBatchFacts]  # of this step
    gradients: GradientCheck
    waited: float  # seconds for the micro-batches
    stop: bool  # this rank was asked to stop
    writing: int  # saving.Writing
    memory: DeviceMemory | None

    @property
    def loss(self) -> float:
        """Mean over the micro-batches."""
        return fmean(each.loss for each in self.micro_batches)


def share(own: RankFacts) -> list[RankFacts]:
    """The facts of all ranks, by rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def any_rank_asked(stop: Stop) -> bool:
    """Whether any rank was asked to stop: the same on all of them. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, stop.asked)
    return any(everyone)


def any_device_asked(stop: Stop, devices: OneDevice) -> bool:
    """Likewise of the devices that share a clip, which all ask."""
    if not isinstance(devices, DeviceGroup):
        return stop.asked
    return bool(devices.collect(torch.tensor(stop.asked, device=this_device())).any())


def of_groups(ranks: Sequence[RankFacts], size: int) -> list[RankFacts]:
    """One for each group of ``size`` ranks that share their clips: the longest wait, the fullest device, any stop."""
    groups = [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return [
        replace(
            group[0],
            waited=max(each.waited for each in group),
            memory=fullest([each.memory for each in group if each.memory]),
            stop=any(each.stop for each in group),
        )
        for group in groups
    ]


def faults_of(ranks: Sequence[RankFacts]) -> list[str]:
    """What is not finite, a line for each rank where it arose; what others made of it counts for nothing."""
    found = []
    for rank, facts in enumerate(ranks):
        faulty = facts.gradients.faulty
        if not math.isfinite(facts.loss):
            found.append(f"the loss of rank {rank} is {facts.loss}")
        elif faulty:
            more = f" and of {len(faulty) - 1} parameters more" if len(faulty) > 1 else ""
            found.append(f"the gradient of {faulty[0]}{more} on rank {rank} is not finite")
    if found:
        return found
    lost = [rank for rank, facts in enumerate(ranks) if not facts.gradients.received_finite]
    return [f"rank {rank} got from finite gradients a sum that is not (see ColossalAI #6091)" for rank in lost]
