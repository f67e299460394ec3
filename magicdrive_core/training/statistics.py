"""What a rank uses: memory of its device and of its host, and how fast the device could be.

Nothing here names a kind of device: torch.accelerator is CUDA, ROCm or a vendor's plugin, or absent on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.device import this_device
from magicdrive_core.parallel.sequence_parallel import RankGroup
from magicdrive_core.training.engine import GradientCheck
from magicdrive_core.training.loader import Batch
from magicdrive_core.utils.memory import memory_left, memory_limit

# Dense TFLOP/s of the data sheets in bf16, and as many in fp16; the longest name that fits counts.
PEAK_TFLOPS = {"A100": 312.0, "A800": 312.0, "H100": 989.0, "H800": 989.0, "H200": 989.0, "H20": 148.0, "L40S": 362.0}


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. The allocator's peaks since the start, and what the driver counts now: the device's true fill.

    The driver's figure holds what the allocator does not know: contexts, communication buffers, other processes.
    """

    allocated: int
    reserved: int
    used: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Of a rank's device; None on a CPU."""
    if device.type == "cpu":
        return None
    free, total = torch.accelerator.get_memory_info(device)
    allocated, reserved = torch.accelerator.max_memory_allocated(device), torch.accelerator.max_memory_reserved(device)
    return DeviceMemory(allocated, reserved, total - free)


def fullest(devices: Sequence[DeviceMemory]) -> DeviceMemory | None:
    """The largest of each figure; None of none."""
    if not devices:
        return None
    return DeviceMemory(*(max(sizes) for sizes in zip(*map(astuple, devices), strict=True)))


def host_memory() -> dict[str, int]:
    """Bytes: of this process (``rss``; ``pss`` counts shared pages by their share), and of the whole container."""
    info = psutil.Process().memory_full_info()
    return {"rss": info.rss, "pss": getattr(info, "pss", info.rss), "container": memory_limit() - memory_left()}


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Of one device; None where nothing is configured and the device is not in the table."""
    if configured is not None or device.type == "cpu" or precision == "fp32":
        return configured
    name = str(torch.get_device_module(device).get_device_name(device))
    return next((PEAK_TFLOPS[known] for known in sorted(PEAK_TFLOPS, key=len, reverse=True) if known in name), None)


# What the ranks tell each other at every step: losses, sizes, faults, and whether one of them was asked to stop.

BINS = 10  # of the noise level, equally wide


class StopSource(Protocol):
    """Says whether this rank was asked to stop."""

    @property
    def requested(self) -> bool: ...


@dataclass(frozen=True)
class MicroBatchStatistics:
    """What a rank knows of a micro-batch after its passes."""

    loss: float
    by_noise: list[tuple[int, float]]  # of each sample: bin of its noise level, loss
    bucket: int
    clips: int
    tokens: int  # latent positions of the network's input, all views
    flops: float  # of the network, forward and backward

    @classmethod
    def of(cls, losses: Tensor, t: Tensor, batch: Batch) -> MicroBatchStatistics:
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
class RankStatistics:
    """What every rank tells all others at each step."""

    micro_batches: list[MicroBatchStatistics]  # of this step
    gradients: GradientCheck
    waited: float  # seconds for the micro-batches
    stop: bool  # this rank was asked to stop
    writing: int  # saving.WriteStatus
    memory: DeviceMemory | None

    @property
    def loss(self) -> float:
        """Mean over the micro-batches."""
        return fmean(each.loss for each in self.micro_batches)


def share(own: RankStatistics) -> list[RankStatistics]:
    """The facts of all ranks, by rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def any_rank_requested(stop: StopSource) -> bool:
    """Whether any rank was asked to stop: the same on all of them. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, stop.requested)
    return any(everyone)


def any_device_requested(stop: StopSource, group: RankGroup | None) -> bool:
    """Likewise of the devices that share a clip, which all ask."""
    if group is None:
        return stop.requested
    return bool(group.all_gather(torch.tensor(stop.requested, device=this_device())).any())


def merge_groups(ranks: Sequence[RankStatistics], size: int) -> list[RankStatistics]:
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


def find_faults(ranks: Sequence[RankStatistics]) -> list[str]:
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
