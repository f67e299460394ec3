"""ZeRO's shards of the parameters, by name: every rank holds 1/ranks of each fp32 tensor, flat and padded.

Master weights, Adam's moments and the EMA are cut alike, so that one pair of functions moves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def masters(engine: Engine) -> dict[str, Tensor]:
    """This rank's shards of the fp32 master weights: trainable parameters only, in the order of the network."""
    to_master = engine.optimizer.get_working_to_master_map()
    return {name: to_master[id(p)] for name, p in engine.network.named_parameters() if id(p) in to_master}


def gather(engine: Engine, shards: dict[str, Tensor], *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields each name with the whole tensor, on the CPU, made of all ranks' shards.

    A collective: every rank must run it to its end. Ranks other than 0 get empty tensors unless ``everywhere``.
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
    """This rank's shards of Adam's moments, by kind and name; none before a parameter's first step."""
    state = engine.optimizer.optim.state
    own = {name: state[master] for name, master in masters(engine).items() if master in state}
    return {kind: {name: values[kind] for name, values in own.items()} for kind in MOMENTS}


def set_moments(engine: Engine, shards: dict[str, dict[str, Tensor]], steps: dict[str, int]) -> None:
    """Sets shards of Adam's moments, by kind and name, and how many steps each parameter has been through."""
    state = engine.optimizer.optim.state
    for name, master in masters(engine).items():
        if name in steps:
            step = torch.tensor(float(steps[name]), device=master.device)  # fused AdamW counts on the device
            state[master] = {"step": step} | {kind: shards[kind][name] for kind in MOMENTS}


def moment_steps(engine: Engine) -> dict[str, int]:
    """How many steps of Adam each parameter has been through."""
    state = engine.optimizer.optim.state
    return {name: int(state[master]["step"]) for name, master in masters(engine).items() if master in state}


@torch.no_grad()
def set_masters(engine: Engine, shards: dict[str, Tensor]) -> None:
    """Sets this rank's master weights, and from all ranks' the working weights. Collective."""
    for name, master in masters(engine).items():
        master.copy_(shards[name])
    parameters = dict(engine.network.named_parameters())
    for name, whole in gather(engine, masters(engine), everywhere=True):
        parameters[name].copy_(whole)


# Exponential moving average of the weights, in fp32, sharded over the ranks like the master weights it follows.


class Ema:
    """ema <- decay * ema + (1 - decay) * master, for the trainable parameters; it starts as a copy of them."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._masters = masters(engine)
        self.shards = {name: master.detach().clone() for name, master in self._masters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After each step of the optimizer."""
        torch._foreach_lerp_(list(self.shards.values()), list(self._masters.values()), 1 - self._decay)

    def gather(self) -> dict[str, Tensor]:
        """The network's whole state dict in fp32 with the averages in it; empty on ranks other than 0. Collective."""
        averages = dict(gather(self._engine, self.shards))
        if dist.get_rank() != 0:
            return {}
        whole = averages | self._engine.fixed
        return {name: whole[name].contiguous() for name in self._engine.network.state_dict()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averages as its weights; afterwards its own again, bit for bit. Collective."""
        parameters = dict(self._engine.network.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.shards}
        with torch.no_grad():
            for name, average in gather(self._engine, self.shards, everywhere=True):
                parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in own.items():
                    parameters[name].copy_(weight)
