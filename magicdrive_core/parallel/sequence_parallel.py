"""Sequence parallelism: the S places of every frame shared out among p devices (Ulysses, Jacobs et al. 2023).

Each device holds n = ceil(S / p) places of every frame of every view, one after the other, and all that a block does
to a place alone happens where the place is. Attention within a frame needs all of them: there the devices exchange
places for heads, so that each has all S places of h / p heads, and back. Attention to the context takes the same way:
no device needs more than its own heads' keys and values of the context.

Where p does not divide S, the last shares are filled up with zeros, at most p - 1 in all. No attention looks at these
and they are cut off at the end, so that any number of devices gives one result (docs/decisions/0004).

The collectives are differentiable as the linear maps that they are. With every rank's own loss L_r on its whole output,
gradients averaged over all ranks are therefore those of the mean of all L_r: no gradient is scaled by hand.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional


class Places:
    """The places of a frame on a single device, which has all of them and all heads: nothing is moved."""

    def __init__(self, count: int) -> None:
        """S, the places that there are."""
        self.count = count

    def own(self, x: Tensor) -> Tensor:
        """This device's share: (..., S, C) -> (..., n, C)."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All shares together, the filling cut off: (..., n, C) -> (..., S, C)."""
        return x

    def heads(self, count: int) -> slice:
        """Which of ``count`` heads are this device's own."""
        return slice(0, count)

    def by_heads(self, x: Tensor) -> Tensor:
        """Own places of all heads -> all places of own heads: (R, n, ..., h, d) -> (R, p * n, ..., h / p, d)."""
        return x

    def by_places(self, x: Tensor) -> Tensor:
        """The way back: (R, p * n, h / p, d) -> (R, n, h, d)."""
        return x


class OneDevice:
    """No sequence parallelism."""

    size = 1

    def places(self, count: int) -> Places:
        """How ``count`` places of a frame are shared out."""
        return Places(count)


class RankGroup(OneDevice):
    """The devices of a process group share the places of every frame. All of them make every call, in one order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def places(self, count: int) -> Places:
        """Alike."""
        return SharedPlaces(count, self)

    def all_to_all(self, x: Tensor) -> Tensor:
        """(p, ...): part i goes to device i, and part i of the result came from there."""
        return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), None, None, self._group))

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) -> (p, ...): every device's tensor, on all of them."""
        return collectives.wait_tensor(collectives.all_gather_single(x.contiguous()[None], 0, self._group))


class SharedPlaces(Places):
    """The places of a frame on the devices of a group."""

    def __init__(self, count: int, devices: RankGroup) -> None:
        super().__init__(count)
        self._devices = devices
        self._share = -(-count // devices.size)

    def own(self, x: Tensor) -> Tensor:
        missing = self._devices.size * self._share - self.count
        return functional.pad(x, (0, 0, 0, missing)).narrow(-2, self._devices.rank * self._share, self._share)

    def whole(self, x: Tensor) -> Tensor:
        return self._devices.all_gather(x).movedim(0, -3).flatten(-3, -2)[..., : self.count, :]

    def heads(self, count: int) -> slice:
        share = count // self._devices.size
        return slice(self._devices.rank * share, (self._devices.rank + 1) * share)

    def by_heads(self, x: Tensor) -> Tensor:
        received = self._devices.all_to_all(x.unflatten(-2, (self._devices.size, -1)).movedim(-3, 0))
        return received.movedim(0, 1).flatten(1, 2)

    def by_places(self, x: Tensor) -> Tensor:
        received = self._devices.all_to_all(x.unflatten(1, (self._devices.size, -1)).movedim(1, 0))
        return received.movedim(0, -3).flatten(-3, -2)
