"""The kernels' functions by torch's own operations: any device, any dtype. What the C++ kernels compute, in the open.

Every function of ``Backend`` in ``functions.py`` is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

NORM_EPS = 1e-6

aten = torch.ops.aten


# Attention ------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes softmax(q k' / sqrt(d) + bias) v for each head.

    Args:
        q: (R, n, h, d).
        k: (R, m, h, d).
        v: (R, m, h, d).
        bias: broadcastable to (R, h, n, m), 0 or -inf: what must not be attended to.

    Returns:
        (R, n, h, d).
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def attend_context(q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
    """Computes attention to other tokens, whose keys and values are packed.

    Args:
        q: (R, n, h, d).
        kv: (R, m, 2, h, d): k, then v.
        bias: (R, m), added to the scores: 0, or -inf at what must not be attended to; None: all is attended to.

    Returns:
        (R, n, h, d).
    """
    k, v = kv.unbind(2)
    return attend(q, k, v, None if bias is None else bias[:, None, None])


def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
    """Computes attention among the tokens of every sequence.

    Args:
        packed: (outer, inner, n, 3, h, d): q, k and v before their norm; of any strides but d's.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a sequence, from the first on, that are attended to.
        angles: (n, d/2, 2), cosines and sines that turn q and k after the norm; None: they are not turned.

    Returns:
        (outer, inner, n, h, d).
    """
    q, k, v = normed_heads(packed.flatten(0, 1), norm)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return attend(q, k[:, :count], v[:, :count]).unflatten(0, packed.shape[:2])


def attend_neighbours(packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[Sequence[int]]) -> Tensor:
    """Computes attention of every view to each of its neighbours in the same frame, summed over these.

    Args:
        packed: (B, V, T, n, 3, h, d): q, k and v before their norm.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a frame, from the first on, that are attended to.
        neighbours: the views that each view attends to, equally many of each.

    Returns:
        (B, V, T, n, h, d).
    """
    q, k, v = ([view.flatten(0, 1) for view in part.unbind(1)] for part in normed_heads(packed, norm))
    k, v = ([view[:, :count] for view in part] for part in (k, v))
    sums = []
    for view, (first, *others) in enumerate(neighbours):
        total = attend(q[view], k[first], v[first])
        for other in others:
            total = total + attend(q[view], k[other], v[other])
        sums.append(total.unflatten(0, (len(packed), -1)))
    return torch.stack(sums, dim=1)


def normed_heads(packed: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits packed tokens into q, k and v, with an RMS norm over the channels of each head of q and k.

    Args:
        packed: (..., 3, h, d): q, k and v.
        norm: (2, d), weights of the norms of q and k.

    Returns:
        q, k and v, (..., h, d) each.
    """
    return _NormedHeads.apply(packed, norm)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the channel pairs of each token by its angles, computed in fp32 (``Rotary``).

    Args:
        x: (R, n, h, d).
        angles: (n, d/2, 2), fp32, cosine and sine of each angle.

    Returns:
        (R, n, h, d) in the dtype of ``x``.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(angles)[:, None]).flatten(-2).to(x.dtype)


class _NormedHeads(torch.autograd.Function):
    """Keeps the packed tensor and one factor a head; the backward pass computes the normalised q and k again."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = (packed[..., :2, :, :].float().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt_().to(packed.dtype)
        ctx.save_for_backward(packed, norm, inverse)
        q, k = ((packed[..., i, :, :] * inverse[..., i, :, :]).mul_(norm[i]) for i in range(2))
        return q, k, packed[..., 2, :, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        packed, norm, inverse = ctx.saved_tensors
        at_packed, at_norm = torch.empty_like(packed), []
        for i, gradient in enumerate(gradients[:2]):
            factor = inverse[..., i, :, :]
            normed = packed[..., i, :, :] * factor
            at_norm.append((gradient * normed).sum_to_size(norm.shape[-1:]))
            inner = gradient * norm[i]
            inner.sub_(normed.mul_((inner * normed).mean(-1, keepdim=True)))
            torch.mul(inner, factor, out=at_packed[..., i, :, :])
        at_packed[..., 2, :, :] = gradients[2]
        return at_packed, torch.stack(at_norm)


# Norms, linear maps and MLPs of modulated rows ------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Computes LN(x) * (1 + scale) + shift, LN without affine weights.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``functions.modulate``.
        scale: shaped like ``shift``.

    Returns:
        (..., C).
    """
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def modulate_backward(gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of ``modulate``.

    Args:
        gradient: (..., C), gradient at the result of ``modulate``.
        x: (..., C), argument of ``modulate``.
        shift: argument of ``modulate``, broadcastable against ``x``.
        scale: shaped like ``shift``.

    Returns:
        The gradients at ``x``, ``shift`` and ``scale``, each shaped like its tensor.
    """
    normed, mean, deviation = aten.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
    inner = gradient * (1 + scale)
    outer = aten.native_layer_norm_backward(inner, x, x.shape[-1:], mean, deviation, None, None, [True, False, False])[
        0
    ]
    return outer, gradient.sum_to_size(shift.shape), normed.mul_(gradient).sum_to_size(scale.shape)


def linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes Linear(LN(x) * (1 + scale) + shift).

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``functions.modulate``.
        scale: shaped like ``shift``.
        weight: (D, C).
        bias: (D); None: the map has none.

    Returns:
        (..., D).
    """
    return functional.linear(modulate(x, shift, scale), weight, bias)


def mlp(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Computes Linear(GELU(Linear(LN(x) * (1 + scale) + shift))), GELU in its tanh form.

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
    """
    return mlp_of(modulate(x, shift, scale), up, up_bias, down, down_bias, keep)


def mlp_of(
    modulated: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Computes ``mlp`` of rows that are already modulated.

    Args:
        modulated: (..., C).
        up: (D, C), weight of the first linear map.
        up_bias: (D).
        down: (C, D), weight of the second linear map.
        down_bias: (C).
        keep: whether the backward pass will need GELU's input.

    Returns:
        (..., C), and GELU's input (R, D) for the R rows; empty unless ``keep``.
    """
    hidden = functional.linear(modulated.flatten(0, -2), up, up_bias)
    value = functional.gelu(hidden, approximate="tanh")
    if not keep:
        hidden = hidden.new_empty(0)  # frees what is four times the tokens
    return functional.linear(value, down, down_bias).view(modulated.shape), hidden


def gelu_backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Computes GELU again and its gradient, in the tanh form.

    Args:
        x: (R, D), GELU's input.
        gradient: (R, D), gradient at GELU's output.

    Returns:
        GELU(x), and the gradient at ``x``, (R, D) each.
    """
    return functional.gelu(x, approximate="tanh"), aten.gelu_backward(gradient, x, approximate="tanh")
