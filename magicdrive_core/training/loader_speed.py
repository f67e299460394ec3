"""How fast a stage's micro-batches come, and what they hold in memory, without a network."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.training.budget import Budget
from magicdrive_core.training.loader import Batch, Loader
from magicdrive_core.utils.memory import memory_left, memory_limit, resident


@dataclass(frozen=True)
class LoaderSpeed:
    """What one rank's loader did.

    Attributes:
        clips: that came.
        seconds: they took.
        batches: bytes of a micro-batch as measured, the largest one by bucket name.
        held: most bytes of micro-batches that waited and of maps that were kept.
        resident: bytes of physical memory of the process at the end.
        limit: bytes that the container may hold.
        left: bytes that it still may hold.
        budget: what the loader may hold.
    """

    clips: int
    seconds: float
    batches: dict[str, int]
    held: int
    resident: int
    limit: int
    left: int
    budget: Budget

    def lines(self) -> list[str]:
        """A report for people."""
        out = [
            f"{self.clips / self.seconds:.2f} clips/s ({self.clips} clips in {self.seconds:.1f} s, one rank)",
            f"held: {_mib(self.held)} of micro-batches and maps; the process: {_mib(self.resident)}",
            f"container: {_mib(self.limit)}, of which {_mib(self.left)} are left",
            f"a rank may hold {_mib(self.budget.waiting)} of micro-batches that wait, {_mib(self.budget.maps)} of maps",
        ]
        for name, planned in self.budget.batches.items():
            measured = f"measured {_mib(self.batches[name])}" if name in self.batches else "none came"
            ahead = max(1, self.budget.waiting // planned)
            out.append(f"  {name:14} {_mib(planned)} a micro-batch ({measured}), {ahead} may wait")
        return out


def measure_loader(
    config: Config, stage: Stage, *, seconds: float, ranks: int = 1, project: Path = Path()
) -> LoaderSpeed:
    """Takes micro-batches for so long, as the first of ``ranks``.

    Raises:
        MagicDriveError: a cache is missing or stale, or the micro-batches do not fit into memory.
    """
    clips = held = 0
    batches: dict[str, int] = {}
    with Loader(config, stage, project) as loader:
        loader.start(0, groups=ranks, group=0)
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds or not clips:
            batch = loader.next()
            clips += len(batch.latents)
            name = loader.buckets[batch.bucket].name
            batches[name] = max(batches.get(name, 0), batch_nbytes(batch))
            held = max(held, loader.held)
        return LoaderSpeed(clips, passed, batches, held, resident(), memory_limit(), memory_left(), loader.budget)


def batch_nbytes(batch: Batch) -> int:
    """Bytes that a micro-batch's tensors really hold; what is expanded over the views counts once."""
    conditions = (getattr(batch.conditions, field.name) for field in fields(batch.conditions))
    tensors = [tensor for tensor in (batch.latents, batch.mask, *conditions) if isinstance(tensor, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
