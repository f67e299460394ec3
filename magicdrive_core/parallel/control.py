"""What ranks tell each other beside the computation, over gloo between the CPUs of their hosts.

The default process group carries gradients and activations only. Its collectives run on the device, where NCCL ends a
process whose collective does not finish within ``DEVICE_TIMEOUT``. What one rank does alone for minutes (hashing
checkpoints, drawing a preview, writing weights) is therefore waited for here, by the host and not by the device.
All calls are collective: every rank makes them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from magicdrive_core.device import backend

T = TypeVar("T")

# A rank waits on its device for the slowest loader and the slowest kernels of the others, never for work of one rank.
DEVICE_TIMEOUT = timedelta(minutes=10)
MARGIN = timedelta(minutes=1)  # the launcher, which names the reason, ends a stalled group first

_group: dist.ProcessGroup | None = None


def join(stall_seconds: float) -> None:
    """Enter the default process group and the control group, as the launcher described them in the environment.

    Args:
        stall_seconds: time without a finished step after which the launcher ends all ranks; longer waits than this are
            errors here too.
    """
    global _group
    patience = timedelta(seconds=stall_seconds) + MARGIN
    dist.init_process_group(backend(), timeout=patience if backend() == "gloo" else DEVICE_TIMEOUT)
    _group = dist.new_group(backend="gloo", timeout=patience)


def gather(own: T) -> list[T]:
    """Exchange a value of every rank.

    Args:
        own: this rank's; anything that can be pickled.

    Returns:
        The values of all ranks, by rank.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=_group)
    return everyone


def from_leader(value: T) -> T:
    """Hand rank 0's value to every rank.

    Args:
        value: of rank 0; those of other ranks are ignored.

    Returns:
        Rank 0's value.
    """
    shared = [value]
    dist.broadcast_object_list(shared, src=0, group=_group)
    return shared[0]


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Find out which flags are set on any rank.

    Args:
        flags: of this rank, as many on every rank.

    Returns:
        For each flag whether any rank has set it.
    """
    merged = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(merged, op=dist.ReduceOp.MAX, group=_group)
    return merged.bool().tolist()


def barrier() -> None:
    """Wait until every rank is here."""
    any_rank([True])
