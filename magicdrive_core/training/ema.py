"""Exponential moving average of the weights, in fp32, sharded over the ranks like the master weights it follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.training.shards import gather, masters
from magicdrive_core.training.strategy import Boosted


class Ema:
    """ema <- decay * ema + (1 - decay) * master, for the trainable parameters; it starts as a copy of them."""

    def __init__(self, boosted: Boosted, decay: float) -> None:
        self._boosted = boosted
        self._decay = decay
        self._masters = masters(boosted)
        self.shards = {name: master.detach().clone() for name, master in self._masters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After each step of the optimizer."""
        torch._foreach_lerp_(list(self.shards.values()), list(self._masters.values()), 1 - self._decay)

    def gather(self) -> dict[str, Tensor]:
        """The network's whole state dict in fp32 with the averages in it; empty on ranks other than 0. Collective."""
        averages = dict(gather(self._boosted, self.shards))
        if dist.get_rank() != 0:
            return {}
        whole = averages | self._boosted.fixed
        return {name: whole[name].contiguous() for name in self._boosted.network.state_dict()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averages as its weights; afterwards its own again, bit for bit. Collective."""
        parameters = dict(self._boosted.network.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.shards}
        with torch.no_grad():
            for name, average in gather(self._boosted, self.shards, everywhere=True):
                parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in own.items():
                    parameters[name].copy_(weight)
