"""How many bytes of tensors are alive, counted operation by operation; on fake tensors too, which take none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While active, follows every storage that an operation returns until it is freed.

    Storages count once, whatever views there are of them. What an operation takes and gives back inside itself (a
    convolution's workspace) is not seen.

    Args:
        device: only storages on a device of this type count; None: all.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.live = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before: weights, inputs."""
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        if self._device not in (None, tensor.device.type):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int, _storage: object) -> None:
        del self._alive[key]
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention as a GPU computes it, without the matrix of scores, also where torch is built without one.

    Such a build would choose the plain form for meta tensors, which materialises the scores.
    """

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention and args[0].is_meta:
            q, k, v = args
            mask = kwargs.get("attn_mask")
            if mask is not None:
                mask = mask.expand(*q.shape[:3], k.shape[2])
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]
        return function(*args, **kwargs)
