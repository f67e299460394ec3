"""What the ranks tell each other at every step: losses, sizes, faults, and whether one of them was asked to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from magicdrive_core.training.loader import Batch
from magicdrive_core.training.resources import DeviceMemory, fullest
from magicdrive_core.training.strategy import GradientCheck

BINS = 10  # of the noise level, equally wide


class Stop(Protocol):
    """Says whether this rank was asked to stop."""

    @property
    def asked(self) -> bool: ...


@dataclass(frozen=True)
class RankFacts:
    """What every rank tells all others at each step."""

    loss: float
    by_noise: list[tuple[int, float]]  # of each sample: bin of its noise level, loss
    bucket: int
    clips: int
    tokens: int  # latent positions of the network's input, all views
    flops: float  # of the network, forward and backward
    gradients: GradientCheck
    waited: float  # seconds for the batch
    stop: bool  # this rank was asked to stop
    writing: int  # saving.Writing
    memory: DeviceMemory | None

    @classmethod
    def of(
        cls,
        losses: Tensor,
        t: Tensor,
        batch: Batch,
        *,
        gradients: GradientCheck,
        waited: float,
        stop: Stop,
        writing: int,
        memory: DeviceMemory | None,
    ) -> RankFacts:
        """This rank's; ``losses`` (B) at noise levels ``t`` (B)."""
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
            gradients=gradients,
            waited=waited,
            stop=stop.asked,
            writing=writing,
            memory=memory,
        )


def share(own: RankFacts) -> list[RankFacts]:
    """The facts of all ranks, by rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


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
