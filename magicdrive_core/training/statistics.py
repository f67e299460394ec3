"""What the ranks tell each other at every step, in one exchange: losses, sizes, faults, memory, requests to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean
from typing import Protocol

import torch

from magicdrive_core.device import this_device
from magicdrive_core.parallel import control
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.training.engine import GradientCheck
from magicdrive_core.training.loader import Batch

NOISE_BINS = 10  # of the noise level, equally wide


class StopSource(Protocol):
    """Says whether this rank was requested to stop."""

    @property
    def requested(self) -> bool:
        """True from the first request on."""
        ...


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory.

    Attributes:
        allocated: the allocator's peak since it was last read.
        reserved: its peak with what the allocator keeps for later.
        used: what the driver counts now, with all that the allocator does not know: contexts, communication buffers,
            other processes.
    """

    allocated: int
    reserved: int
    used: int


@dataclass(frozen=True)
class MicroBatchStatistics:
    """One rank's passes over one micro-batch.

    Attributes:
        loss: mean over the samples.
        by_noise: for each sample, the bin of its noise level and its loss.
        bucket: index into ``Loader.buckets``.
        clips: number of samples.
        tokens: number of tokens of the network's input, all views and frames together.
        flops: floating-point operations of the network, forward and backward.
    """

    loss: float
    by_noise: list[tuple[int, float]]
    bucket: int
    clips: int
    tokens: int
    flops: float

    @classmethod
    def of(cls, losses: Sequence[float], batch: Batch) -> MicroBatchStatistics:
        """Summarise this rank's pass over a micro-batch.

        Args:
            losses: their mean, then that of each of B samples, as ``read_passes`` returned them.
            batch: the micro-batch on the host, whose latents are (B, V, C, T, h, w).

        Returns:
            The statistics. A token is a patch of 2 x 2 latents, so that a frame of a view has ceil(h / 2) ceil(w / 2).
        """
        clips, views, _, frames, height, width = batch.latents.shape
        loss, *of_samples = losses
        bins = [min(NOISE_BINS - 1, int(level * NOISE_BINS / 1000)) for level in batch.t.tolist()]
        return cls(
            loss=loss,
            by_noise=list(zip(bins, of_samples, strict=True)),
            bucket=batch.bucket,
            clips=clips,
            tokens=clips * views * frames * math.ceil(height / 2) * math.ceil(width / 2),
            flops=batch.flops,
        )


@dataclass(frozen=True)
class RankStatistics:
    """What one rank tells all others at a step.

    Attributes:
        micro_batches: statistics of this step's passes.
        gradients: whether they are finite.
        waited: seconds for the loader.
        stop: whether this rank was requested to stop.
        write_status: how far this rank's part of a checkpoint is (checkpoints.WriteStatus).
        memory: what this rank's device holds; None on a CPU, and at steps that do not log.
    """

    micro_batches: list[MicroBatchStatistics]
    gradients: GradientCheck
    waited: float
    stop: bool
    write_status: int
    memory: DeviceMemory | None

    @property
    def loss(self) -> float:
        """Mean over the micro-batches."""
        return fmean(each.loss for each in self.micro_batches)


def gather_statistics(own: RankStatistics) -> list[RankStatistics]:
    """Exchange the statistics of all ranks. Collective.

    Args:
        own: statistics of this rank.

    Returns:
        Statistics of all ranks, by rank.
    """
    return control.gather(own)


def merge_groups(ranks: Sequence[RankStatistics], size: int) -> list[RankStatistics]:
    """Merge the statistics of each ``size`` neighbouring ranks, which share their clips.

    Args:
        ranks: statistics of all ranks, by rank.
        size: ranks that share clips; 1 merges none.

    Returns:
        One for each group: losses of its first rank, the longest wait, the fullest device, any request to stop.
    """
    groups = [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return [
        replace(
            group[0],
            waited=max(each.waited for each in group),
            memory=largest([each.memory for each in group if each.memory]),
            stop=any(each.stop for each in group),
        )
        for group in groups
    ]


def stop_requested_on_any_rank(stop: StopSource) -> bool:
    """Agree on whether any rank was requested to stop. Collective.

    Args:
        stop: says whether this rank was requested to stop.

    Returns:
        The same answer on all ranks.
    """
    return control.any_rank([stop.requested])[0]


def stop_requested_in_group(stop: StopSource, group: RankGroup | None) -> bool:
    """Agree on whether any rank of a group was requested to stop. Collective in the group.

    Args:
        stop: says whether this rank was requested to stop.
        group: ranks that share a clip; None: only this rank is asked.

    Returns:
        The same answer on all ranks of the group.
    """
    if group is None:
        return stop.requested
    return bool(group.all_gather(torch.tensor(stop.requested, device=this_device())).any())


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Read the memory of a rank's device, and count its peak anew from here.

    Args:
        device: this rank's device.

    Returns:
        Bytes; None on a CPU.
    """
    if device.type == "cpu":
        return None
    free, total = torch.accelerator.get_memory_info(device)
    allocated, reserved = torch.accelerator.max_memory_allocated(device), torch.accelerator.max_memory_reserved(device)
    torch.accelerator.reset_peak_memory_stats(device)
    return DeviceMemory(allocated, reserved, total - free)


def largest(devices: Sequence[DeviceMemory]) -> DeviceMemory | None:
    """Take the largest of each figure over some devices, so that the figures may come from different ones.

    Args:
        devices: memory of each device.

    Returns:
        The maxima in bytes; None without devices.
    """
    if not devices:
        return None
    return DeviceMemory(*(max(sizes) for sizes in zip(*map(astuple, devices), strict=True)))
