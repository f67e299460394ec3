"""The speed of a stage's loader and the memory that it holds, measured without a network."""

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
    """A measurement of one rank's loader.

    Attributes:
        clips: number of clips that it yielded.
        seconds: that they took.
        batches: bytes of the largest micro-batch of each bucket, by bucket name.
        held: largest number of bytes of waiting micro-batches and kept maps.
        resident: bytes of physical memory of the process at the end.
        limit: bytes that the container may use.
        left: bytes that it may still use.
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
        """Return a report to print.

        Returns:
            Lines without line ends: the speed, the memory, then a line for each bucket.
        """
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
    """Take micro-batches for some time, and at least one.

    Args:
        config: all settings of the run.
        stage: whose loader is measured.
        seconds: how long.
        ranks: that share the micro-batches; the first one is measured.
        project: the project's folder.

    Returns:
        The speed and the memory of one rank's loader.

    Raises:
        MagicDriveError: a cache is missing or stale, or the micro-batches do not fit into memory.
    """
    clips = held = 0
    batches: dict[str, int] = {}
    with Loader(config, stage, project) as loader:
        loader.start(0, groups=ranks, group=0)
        started = time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds or not clips:
            batch = loader.next()
            clips += len(batch.latents)
            name = loader.buckets[batch.bucket].name
            batches[name] = max(batches.get(name, 0), batch_nbytes(batch))
            held = max(held, loader.held)
        return LoaderSpeed(clips, passed, batches, held, resident(), memory_limit(), memory_left(), loader.budget)


def batch_nbytes(batch: Batch) -> int:
    """Return the memory that the tensors of a micro-batch occupy.

    Args:
        batch: whose latents, mask, noise and conditions count.

    Returns:
        Bytes; a tensor that is expanded over the views counts once.
    """
    conditions = (getattr(batch.conditions, field.name) for field in fields(batch.conditions))
    tensors = [
        tensor
        for tensor in (batch.latents, batch.mask, batch.t, batch.noise, *conditions)
        if isinstance(tensor, Tensor)
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
