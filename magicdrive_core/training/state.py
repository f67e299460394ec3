"""The sharded state of a training: fp32 master weights, Adam's moments and the moving average of the weights.

ZeRO cuts each of these tensors, flat and padded with zeros, into one shard for each rank. All are cut in the same way,
so that one function gathers any of them, and checkpoints (checkpoints.py) hold them in one form. Functions that take or
return shards use the parameters' names as keys; only trainable parameters have shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch calls them


def masters(engine: Engine) -> dict[str, Tensor]:
    """Return this rank's shards of the fp32 master weights, in the order of the network's parameters.

    Args:
        engine: whose optimizer holds them.

    Returns:
        The optimizer's own tensors (n), not copies: of each trainable parameter, flat and padded, one part of as many
        equal ones as there are ranks.
    """
    to_master = engine.optimizer.get_working_to_master_map()
    return {name: to_master[id(p)] for name, p in engine.network.named_parameters() if id(p) in to_master}


@torch.no_grad()
def set_masters(engine: Engine, shards: dict[str, Tensor]) -> None:
    """Set this rank's master weights, and the working weights from those of all ranks. Collective.

    Args:
        engine: whose weights are set.
        shards: (n) of this rank, one for each name that ``masters`` returns.
    """
    for name, master in masters(engine).items():
        master.copy_(shards[name])
    set_working(engine, shards)


@torch.no_grad()
def set_working(engine: Engine, shards: dict[str, Tensor]) -> None:
    """Set the network's weights from the shards of all ranks, on the device and in its precision. Collective.

    Args:
        engine: whose network is set.
        shards: (n) of this rank by name, in fp32.
    """
    for name, parameter in engine.network.named_parameters():
        if name in shards:
            shard = shards[name].to(parameter.dtype)  # the same numbers as rounding the whole
            whole = shard.new_empty(shard.numel() * dist.get_world_size())
            dist.all_gather_into_tensor(whole, shard)
            parameter.copy_(whole[: parameter.numel()].view_as(parameter))


def gather(engine: Engine, shards: dict[str, Tensor], *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with its whole tensor on the CPU, put together from the shards of all ranks.

    Collective: every rank must run the iteration to its end.

    Args:
        engine: whose parameters give the shapes.
        shards: (n) of this rank by name, the same names in the same order on all ranks.
        everywhere: yield the tensors on all ranks; otherwise ranks other than 0 get empty ones.

    Yields:
        The name and the tensor in the shape of its parameter and the dtype of its shard, without the padding.
    """
    shapes = {name: parameter.shape for name, parameter in engine.network.named_parameters()}
    for name, shard in shards.items():
        whole = torch.empty(shard.numel() * dist.get_world_size(), dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(whole, shard.contiguous())
        if everywhere or dist.get_rank() == 0:
            yield name, whole[: shapes[name].numel()].view(shapes[name]).cpu()
        else:
            yield name, whole[:0].cpu()


def moments(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return this rank's shards of Adam's moments; a parameter has none before its first step.

    Args:
        engine: whose optimizer holds them.

    Returns:
        For each kind of ``MOMENTS`` the shards (n) by name: the optimizer's own tensors, not copies.
    """
    state = engine.optimizer.optim.state
    own = {name: state[master] for name, master in masters(engine).items() if master in state}
    return {kind: {name: values[kind] for name, values in own.items()} for kind in MOMENTS}


def moment_steps(engine: Engine) -> dict[str, int]:
    """Return how many steps of Adam each parameter has made, for its bias correction.

    Args:
        engine: whose optimizer counts them.

    Returns:
        Steps by name; names of parameters without a step are left out.
    """
    state = engine.optimizer.optim.state
    return {name: int(state[master]["step"]) for name, master in masters(engine).items() if master in state}


def set_moments(engine: Engine, shards: dict[str, dict[str, Tensor]], steps: dict[str, int]) -> None:
    """Set Adam's moments and counts of steps, as ``moments`` and ``moment_steps`` return them.

    Args:
        engine: whose optimizer is set.
        shards: for each kind of ``MOMENTS`` the shards (n) of this rank by name.
        steps: steps that each parameter has made, by name; parameters without an entry keep their state.
    """
    state = engine.optimizer.optim.state
    for name, master in masters(engine).items():
        if name in steps:
            step = torch.tensor(float(steps[name]), device=master.device)  # fused AdamW counts on the device
            state[master] = {"step": step} | {kind: shards[kind][name] for kind in MOMENTS}


class Ema:
    """Exponential moving average of the trainable weights in fp32: ema <- decay * ema + (1 - decay) * master.

    It starts as a copy of the master weights and is sharded like them.

    Args:
        engine: whose master weights it follows.
        decay: share of the average that remains at each step, in [0, 1].
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._masters = masters(engine)
        self.shards = {name: master.detach().clone() for name, master in self._masters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the master weights; called after each step of the optimizer."""
        torch._foreach_lerp_(list(self.shards.values()), list(self._masters.values()), 1 - self._decay)

    def gather(self) -> dict[str, Tensor]:
        """Put the averages of all ranks together. Collective.

        Returns:
            The network's state dict in fp32 on the CPU: averages of the trainable weights, the engine's fixed tensors
            as they are. Empty on ranks other than 0.
        """
        averages = dict(gather(self._engine, self.shards))
        if dist.get_rank() != 0:
            return {}
        whole = averages | self._engine.fixed
        return {name: whole[name].contiguous() for name in self._engine.network.state_dict()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averages as its weights inside the block, and its own back, bit for bit. Collective.

        Its own are the rounded masters at any time between two steps: no copy of them is kept.
        """
        set_working(self._engine, self.shards)
        try:
            yield
        finally:
            set_working(self._engine, self._masters)
