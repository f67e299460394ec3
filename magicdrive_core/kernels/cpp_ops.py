"""The kernels' functions in C++, as operations of torch: fp32 on a CPU.

They have gradients, and go through FakeTensorMode, export and compile as single operations. Every function of
``Backend`` in ``functions.py`` is here.

Packed is (outer, inner, n, 3, h, d): sequences of n tokens with q, k and v, outer and inner two dimensions of any
strides, so that sequences across memory need no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magicdrive_core.kernels import library, torch_ops
from magicdrive_core.kernels.library import WIDTHS, Attention, Modulation, new_norms


@torch.library.custom_op("magicdrive::attend_packed", mutates_args=(), device_types="cpu")
def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
    """Computes attention among the tokens of every sequence, in fp32 on a CPU.

    Args:
        packed: (outer, inner, n, 3, h, d): q, k and v before their norm; of any strides but d's.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a sequence, from the first on, that are attended to.
        angles: (n, d/2, 2), cosines and sines that turn q and k after the norm; None: they are not turned.

    Returns:
        (outer, inner, n, h, d), in memory in the order of ``packed``.

    Raises:
        ValueError: there are no keys, or the channels of a head are not adjacent in memory.
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
    _packed(packed, norm, count, angles).backward(_with_adjacent_channels(gradient), at, norms, (False, False))
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


def attend_neighbours(packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[Sequence[int]]) -> Tensor:
    """Computes attention of every view to each of its neighbours in the same frame, summed over these.

    Args:
        packed: (B, V, T, n, 3, h, d): q, k and v before their norm.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a frame, from the first on, that are attended to.
        neighbours: the views that each view attends to, equally many of each.

    Returns:
        (B, V, T, n, h, d).

    Raises:
        ValueError: there are no keys, or the channels of a head are not adjacent in memory.
    """
    return _attend_neighbours(packed, norm, count, list(chain(*neighbours)))


@torch.library.custom_op("magicdrive::attend_neighbours", mutates_args=(), device_types="cpu")
def _attend_neighbours(packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[int]) -> Tensor:
    """``attend_neighbours`` with those of the first view, then of the second and so on, equally many of each."""
    out = packed.new_empty(_without_kinds(packed))
    for i, (view, other) in enumerate(_pairs(packed, neighbours)):
        add = i % (len(neighbours) // packed.shape[1]) > 0
        _pair(packed, view, other, norm, count).forward(out[:, view], add=add)
    return out


@torch.library.custom_op("magicdrive::attend_neighbours_backward", mutates_args=(), device_types="cpu")
def _attend_neighbours_backward(
    gradient: Tensor, packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[int]
) -> tuple[Tensor, Tensor]:
    at_packed, norms = torch.empty_like(packed), new_norms(norm)
    gradient = _with_adjacent_channels(gradient)
    written: set[tuple[str, int]] = set()  # later gradients are added
    for view, other in _pairs(packed, neighbours):
        at = _parts(at_packed[:, view], count)[0], *_parts(at_packed[:, other], count)[1:]
        add = ("q", view) in written, ("kv", other) in written
        _pair(packed, view, other, norm, count).backward(gradient[:, view], at, norms, add)
        written |= {("q", view), ("kv", other)}
    for view in range(packed.shape[1]):
        at_packed[:, view, :, count if ("kv", view) in written else 0 :, 1:] = 0
    return at_packed, norms.sum(0)


@_attend_neighbours.register_fake
def _(packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[int]) -> Tensor:
    return packed.new_empty(_without_kinds(packed))


@_attend_neighbours_backward.register_fake
def _(gradient: Tensor, packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(packed), torch.empty_like(norm)


def _keep_views(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, norm, ctx.count, ctx.neighbours = inputs
    ctx.save_for_backward(packed, norm)


def _from_views(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    packed, norm = ctx.saved_tensors
    return *_attend_neighbours_backward(gradient, packed, norm, ctx.count, ctx.neighbours), None, None


_attend_neighbours.register_autograd(_from_views, setup_context=_keep_views)


# Attention to the context ---------------------------------------------------------------------------------------------


@torch.library.custom_op("magicdrive::attend_context", mutates_args=(), device_types="cpu")
def attend_context(q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
    """Computes attention to other tokens, whose keys and values are packed, in fp32 on a CPU.

    Args:
        q: (R, n, h, d).
        kv: (R, m, 2, h, d): k, then v.
        bias: (R, m), added to the scores: 0, or -inf at what must not be attended to; None: all is attended to.

    Returns:
        (R, n, h, d).

    Raises:
        ValueError: there are no keys, or the channels of a head are not adjacent in memory.
    """
    out = q.new_empty(q.shape)
    _to_context(q, kv, bias).forward(out[None])
    return out


@torch.library.custom_op("magicdrive::attend_context_backward", mutates_args=(), device_types="cpu")
def _attend_context_backward(gradient: Tensor, q: Tensor, kv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    at_q, at_kv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    at = at_q[None], at_kv[None, :, :, 0], at_kv[None, :, :, 1]
    _to_context(q, kv, bias).backward(_with_adjacent_channels(gradient)[None], at, None, (False, False))
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


# Shapes of attention ------------------------------------------------------------------------------------------------


def _ordered_like(packed: Tensor) -> Tensor:
    """An empty (outer, inner, n, h, d) for what attention gives, in memory in the order of ``packed``."""
    outer, inner, tokens, _, heads, d = packed.shape
    if packed.stride(1) < packed.stride(2):
        return packed.new_empty(outer, tokens, inner, heads, d).transpose(1, 2)
    return packed.new_empty(outer, inner, tokens, heads, d)


def _parts(packed: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Takes q of all tokens, k and v of the first ``count``."""
    return packed[:, :, :, 0], packed[:, :, :count, 1], packed[:, :, :count, 2]


def _packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Attention:
    return Attention(*_parts(packed, count), norm, angles)


def _without_kinds(packed: Tensor) -> tuple[int, ...]:
    """The shape (B, V, T, n, h, d) of what attention of (B, V, T, n, 3, h, d) gives."""
    return *packed.shape[:4], *packed.shape[5:]


def _pairs(packed: Tensor, neighbours: Sequence[int]) -> list[tuple[int, int]]:
    """Every view with each of its neighbours."""
    each = len(neighbours) // packed.shape[1]
    return [(i // each, other) for i, other in enumerate(neighbours)]


def _pair(packed: Tensor, view: int, other: int, norm: Tensor, count: int) -> Attention:
    return Attention(_parts(packed[:, view], count)[0], *_parts(packed[:, other], count)[1:], norm)


def _to_context(q: Tensor, kv: Tensor, bias: Tensor | None) -> Attention:
    return Attention(q[None], kv[None, :, :, 0], kv[None, :, :, 1], bias=bias)


def _with_adjacent_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("magicdrive::modulate", mutates_args=(), device_types="cpu")
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Computes LN(x) * (1 + scale) + shift, LN without affine weights, in fp32 on a CPU.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``functions.modulate``.
        scale: shaped like ``shift``.

    Returns:
        (..., C).

    Raises:
        ValueError: the modulation has a broadcast that ``_modulation`` does not support.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    _modulation(x, shift, scale).forward(_rows(x), out)
    return out


@torch.library.custom_op("magicdrive::modulate_backward", mutates_args=(), device_types="cpu")
def _modulate_backward(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at x, shift and scale of ``modulate``."""
    gradient, x = gradient.contiguous(), x.contiguous()
    at_x = torch.empty_like(x)
    at_shift, at_scale = _modulation(x, scale, scale).backward(gradient, _rows(x), at_x)
    return at_x, at_shift.view(scale.shape), at_scale.view(scale.shape)


@torch.library.custom_op("magicdrive::modulated_linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(weight))
    x = x.contiguous()
    _modulation(x, shift, scale).linear(_rows(x), weight.contiguous(), bias, out)
    return out


@torch.library.custom_op("magicdrive::mlp", mutates_args=(), device_types="cpu")
def _mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, hidden = torch.empty_like(x), x.new_empty(_hidden_shape(x, up, keep))
    maps = (up.contiguous(), up_bias), (down.contiguous(), down_bias)
    _modulation(x, shift, scale).mlp(_rows(x), *maps, hidden if keep else None, out)
    return out, hidden


@torch.library.custom_op("magicdrive::gelu_backward", mutates_args=("gradient",), device_types="cpu")
def _gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    """GELU(x); the gradient becomes that at x. Both are contiguous."""
    value = torch.empty_like(x)
    library.gelu_backward(x, gradient, value)
    return value


@modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_modulate_backward.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@_linear.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@_mlp.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(_hidden_shape(x, up, keep))


@_gelu_backward.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_modulated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale = inputs
    ctx.save_for_backward(x, scale)


def _from_modulated(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _modulate_backward(gradient, *ctx.saved_tensors)


modulate.register_autograd(_from_modulated, setup_context=_keep_modulated)


def modulate_backward(gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of ``modulate``, in fp32 on a CPU.

    Args:
        gradient: (..., C), gradient at the result of ``modulate``.
        x: (..., C), argument of ``modulate``.
        shift: argument of ``modulate``, broadcastable against ``x``.
        scale: shaped like ``shift``.

    Returns:
        The gradients at ``x``, ``shift`` and ``scale``, each shaped like its tensor.

    Raises:
        ValueError: the modulation has a broadcast that ``_modulation`` does not support.
    """
    return _modulate_backward(gradient, x, scale)


def linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes Linear(LN(x) * (1 + scale) + shift), in fp32 on a CPU.

    Where a size of the map is no multiple of ``WIDTHS``, torch multiplies.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``functions.modulate``.
        scale: shaped like ``shift``.
        weight: (D, C).
        bias: (D); None: the map has none.

    Returns:
        (..., D).

    Raises:
        ValueError: the modulation has a broadcast that ``_modulation`` does not support.
    """
    if _serves(weight):
        return _linear(x, shift, scale, weight, bias)
    return functional.linear(modulate(x, shift, scale), weight, bias)


def mlp(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Computes Linear(GELU(Linear(LN(x) * (1 + scale) + shift))), GELU in its tanh form, in fp32 on a CPU.

    Where a size of the maps is no multiple of ``WIDTHS``, torch multiplies.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``functions.modulate``.
        scale: shaped like ``shift``.
        up: (D, C), weight of the first linear map.
        up_bias: (D).
        down: (C, D), weight of the second linear map.
        down_bias: (C).
        keep: whether the backward pass will need GELU's input.

    Returns:
        (..., C), and GELU's input (R, D) for the R rows of ``x``; empty unless ``keep``.

    Raises:
        ValueError: the modulation has a broadcast that ``_modulation`` does not support.
    """
    if _serves(up):
        return _mlp(x, shift, scale, up, up_bias, down, down_bias, keep)
    return torch_ops.mlp_of(modulate(x, shift, scale), up, up_bias, down, down_bias, keep)


def gelu_backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Computes GELU again and its gradient, in the tanh form.

    Args:
        x: (R, D), GELU's input, contiguous.
        gradient: (R, D), gradient at GELU's output, contiguous; the gradient at ``x`` is written over it.

    Returns:
        GELU(x), and ``gradient``, (R, D) each.
    """
    return _gelu_backward(x, gradient), gradient


def _serves(weight: Tensor) -> bool:
    """Whether the kernels know linear maps of this size (D, C)."""
    return weight.shape[0] % WIDTHS == 0 and weight.shape[1] % WIDTHS == 0


# Shapes of rows ------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (R, C), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _hidden_shape(x: Tensor, up: Tensor, keep: bool) -> tuple[int, int]:
    return x[..., 0].numel() if keep else 0, up.shape[0]


def _modulation(x: Tensor, shift: Tensor, scale: Tensor) -> Modulation:
    """Which rows of ``x`` (..., C) a broadcast modulation belongs to.

    From the last dimension of rows outwards: dimensions along which the modulation is the same, then dimensions that it
    has too, then again some along which it is the same; and further out it has all dimensions or none.

    Raises:
        ValueError: another broadcast.
    """
    sizes = list(x.shape[:-1])
    has = [1] * (len(sizes) - shift.ndim + 1) + list(shift.shape[:-1])
    period = inner = repeat = 1
    while sizes and has[-1] == 1:
        period, _ = period * sizes.pop(), has.pop()
    while sizes and has[-1] == sizes[-1]:
        inner, _ = inner * sizes.pop(), has.pop()
    while sizes and has[-1] == 1:
        repeat, _ = repeat * sizes.pop(), has.pop()
    if has != sizes and any(size != 1 for size in has):
        raise ValueError(f"cannot broadcast a modulation of shape {tuple(shift.shape)} over {tuple(x.shape)}")
    return Modulation(_rows(shift), _rows(scale), period, inner, repeat)
