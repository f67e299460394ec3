"""What the ranks tell each other at every step: losses, sizes, and whether one of them was asked to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.training.loader import Batch


class Stop(Protocol):
    """Says whether this rank was asked to stop."""

    @property
    def asked(self) -> bool: ...


@dataclass(frozen=True)
class RankFacts:
    """What every rank tells all others at each step."""

    loss: float
    bucket: int
    clips: int
    tokens: int  # latent positions of the network's input, all views
    waited: float  # seconds for the batch
    stop: bool  # this rank was asked to stop

    @classmethod
    def of(cls, loss: Tensor, batch: Batch, waited: float, stop: Stop) -> RankFacts:
        """This rank's."""
        _, views, _, frames, height, width = batch.latents.shape
        tokens = len(batch.latents) * views * frames * math.ceil(height / 2) * math.ceil(width / 2)
        return cls(loss.item(), batch.bucket, len(batch.latents), tokens, waited, stop.asked)


def share(own: RankFacts, device: torch.device) -> list[RankFacts]:
    """The facts of all ranks, by rank. Collective."""
    mine = torch.tensor([own.loss, own.bucket, own.clips, own.tokens, own.waited, own.stop], dtype=torch.float64)
    everyone = torch.empty(dist.get_world_size() * len(mine), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(everyone, mine.to(device))
    return [
        RankFacts(loss, int(bucket), int(clips), int(tokens), waited, bool(stop))
        for loss, bucket, clips, tokens, waited, stop in everyone.view(-1, len(mine)).tolist()
    ]


def of_groups(ranks: list[RankFacts], size: int) -> list[RankFacts]:
    """One for each group of ``size`` ranks that share their clips: the longest wait, and whether any shall stop."""
    groups = [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return [
        replace(group[0], waited=max(each.waited for each in group), stop=any(each.stop for each in group))
        for group in groups
    ]


def check_losses(ranks: list[RankFacts], step: int) -> None:
    """Raises on every rank when the loss of any is not finite, before the weights are touched."""
    bad = [rank for rank, facts in enumerate(ranks) if not math.isfinite(facts.loss)]
    if bad:
        raise MagicDriveError(
            f"step {step}: the loss of rank {', '.join(map(str, bad))} is {ranks[bad[0]].loss}",
            "the last checkpoint is sound; lower the learning rate",
        )
