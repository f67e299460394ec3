"""Attention as operations of torch: they have gradients, and go through FakeTensorMode, export and compile.

fp32 on a CPU. Packed is (outer, inner, n, 3, h, d): sequences of n tokens whose q, k and v lie side by side, outer and
inner two dimensions of any strides, so that sequences across memory need no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magicdrive_core.kernels.calls import Attention, new_norms


@torch.library.custom_op("magicdrive::attend_packed", mutates_args=(), device_types="cpu")
def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
    """Attention of every sequence's tokens to its first ``count``, in memory as ``packed`` is ordered.

    Args:
        packed: (outer, inner, n, 3, h, d).
        norm: (2, d), weights of the RMS norms of q and k.
        count: see above.
        angles: (n, d / 2, 2), by which q and k are turned after the norm; or None.

    Returns:
        (outer, inner, n, h, d).
    """
    out = _ordered_like(packed)
    _packed(packed, norm, count, angles).forward(out)
    return out


@torch.library.custom_op("magicdrive::attend_packed_backward", mutates_args=(), device_types="cpu")
def _attend_packed_backward(
    gradient: Tensor, packed: Tensor, norm: Tensor, count: int, angles: Tensor | None
) -> tuple[Tensor, Tensor]:
    at_packed, norms = torch.empty_like(packed), new_norms(norm)
    at_packed[:, :, count:, 1:] = 0
    at = _parts(at_packed, count)
    _packed(packed, norm, count, angles).backward(_with_channels_together(gradient), at, norms, (False, False))
    return at_packed, norms.sum(0)


@attend_packed.register_fake
def _(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
    return _ordered_like(packed)


@_attend_packed_backward.register_fake
def _(gradient: Tensor, packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(packed), torch.empty_like(norm)


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, norm, ctx.count, angles = inputs
    ctx.save_for_backward(packed, norm, angles)


def _from_packed(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, norm, angles = ctx.saved_tensors
    return *_attend_packed_backward(gradient, packed, norm, ctx.count, angles), None, None


attend_packed.register_autograd(_from_packed, setup_context=_keep_packed)


# Attention of views to their neighbours -------------------------------------------------------------------------------


@torch.library.custom_op("magicdrive::attend_neighbours", mutates_args=(), device_types="cpu")
def attend_neighbours(views: Sequence[Tensor], norm: Tensor, count: int, neighbours: Sequence[int]) -> list[Tensor]:
    """Attention of every view to the first ``count`` tokens of each of its neighbours, summed over these.

    Args:
        views: packed, (outer, inner, n, 3, h, d) each.
        norm: (2, d), weights of the RMS norms of q and k.
        count: see above.
        neighbours: of the first view, then of the second and so on, equally many of each.

    Returns:
        For each view (outer, inner, n, h, d).
    """
    sums = [_ordered_like(view) for view in views]
    for i, (view, other) in enumerate(_pairs(views, neighbours)):
        _pair(views[view], views[other], norm, count).forward(sums[view], add=i % (len(neighbours) // len(views)) > 0)
    return sums


@torch.library.custom_op("magicdrive::attend_neighbours_backward", mutates_args=(), device_types="cpu")
def _attend_neighbours_backward(
    gradients: Sequence[Tensor], views: Sequence[Tensor], norm: Tensor, count: int, neighbours: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    at_views, norms = [torch.empty_like(view) for view in views], new_norms(norm)
    gradients = [_with_channels_together(gradient) for gradient in gradients]
    begun: set[tuple[str, int]] = set()  # gradients that something was written to
    for view, other in _pairs(views, neighbours):
        at = _parts(at_views[view], count)[0], *_parts(at_views[other], count)[1:]
        add = ("q", view) in begun, ("kv", other) in begun
        _pair(views[view], views[other], norm, count).backward(gradients[view], at, norms, add)
        begun |= {("q", view), ("kv", other)}
    for i, at_view in enumerate(at_views):
        at_view[:, :, count if ("kv", i) in begun else 0 :, 1:] = 0
    return at_views, norms.sum(0)


@attend_neighbours.register_fake
def _(views: Sequence[Tensor], norm: Tensor, count: int, neighbours: Sequence[int]) -> list[Tensor]:
    return [_ordered_like(view) for view in views]


@_attend_neighbours_backward.register_fake
def _(
    gradients: Sequence[Tensor], views: Sequence[Tensor], norm: Tensor, count: int, neighbours: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(view) for view in views], torch.empty_like(norm)


def _keep_views(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    views, norm, ctx.count, ctx.neighbours = inputs
    ctx.save_for_backward(norm, *views)


def _from_views(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    norm, *views = ctx.saved_tensors
    return *_attend_neighbours_backward(gradients, views, norm, ctx.count, ctx.neighbours), None, None


attend_neighbours.register_autograd(_from_views, setup_context=_keep_views)


# Attention to the context ---------------------------------------------------------------------------------------------


@torch.library.custom_op("magicdrive::attend_context", mutates_args=(), device_types="cpu")
def attend_context(q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
    """Attention to other tokens, whose keys and values lie side by side.

    Args:
        q: (R, n, h, d).
        kv: (R, m, 2, h, d).
        bias: (R, m), 0 or -inf: what must not be attended to; or None.

    Returns:
        (R, n, h, d).
    """
    out = q.new_empty(q.shape)
    _to_context(q, kv, bias).forward(out[None])
    return out


@torch.library.custom_op("magicdrive::attend_context_backward", mutates_args=(), device_types="cpu")
def _attend_context_backward(gradient: Tensor, q: Tensor, kv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    at_q, at_kv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    at = at_q[None], at_kv[None, :, :, 0], at_kv[None, :, :, 1]
    _to_context(q, kv, bias).backward(_with_channels_together(gradient)[None], at, None, (False, False))
    return at_q, at_kv


@attend_context.register_fake
def _(q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@_attend_context_backward.register_fake
def _(gradient: Tensor, q: Tensor, kv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _keep_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _from_context(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_context_backward(gradient, *ctx.saved_tensors), None


attend_context.register_autograd(_from_context, setup_context=_keep_context)


# Shapes


def _ordered_like(packed: Tensor) -> Tensor:
    """An empty (outer, inner, n, h, d) for what attention gives, in memory in the order of ``packed``."""
    outer, inner, tokens, _, heads, d = packed.shape
    if packed.stride(1) < packed.stride(2):
        return packed.new_empty(outer, tokens, inner, heads, d).transpose(1, 2)
    return packed.new_empty(outer, inner, tokens, heads, d)


def _parts(packed: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of all tokens, k and v of the first ``count``."""
    return packed[:, :, :, 0], packed[:, :, :count, 1], packed[:, :, :count, 2]


def _packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Attention:
    return Attention(*_parts(packed, count), norm, angles)


def _pairs(views: Sequence[Tensor], neighbours: Sequence[int]) -> list[tuple[int, int]]:
    each = len(neighbours) // len(views)
    return [(i // each, other) for i, other in enumerate(neighbours)]


def _pair(view: Tensor, other: Tensor, norm: Tensor, count: int) -> Attention:
    return Attention(view[:, :, :, 0], *_parts(other, count)[1:], norm)


def _to_context(q: Tensor, kv: Tensor, bias: Tensor | None) -> Attention:
    return Attention(q[None], kv[None, :, :, 0], kv[None, :, :, 1], bias=bias)


def _with_channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
