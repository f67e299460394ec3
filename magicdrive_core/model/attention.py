"""Attention among tokens whose q, k and v lie packed as one linear map gives them, with an RMS norm on q and k.

In fp32 on a CPU kernels of our own do all of it (native/), and keep nothing for the backward pass but what they were
given. Elsewhere torch chooses the kernel, and keeps what that one needs.

Packed is (R, n, 3, h, d): R sequences of n tokens, h heads of d channels.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from magicdrive_core.kernels import attention_ops, library
from magicdrive_core.kernels.functions import NORM_EPS


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v, for each head.

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
    """Attention to other tokens, whose keys and values lie side by side.

    Of q (R, n, h, d) to kv (R, m, 2, h, d) under bias (R, m), 0 or -inf, or None: (R, n, h, d).
    """
    if library.usable(q):
        return attention_ops.attend_context(q, kv, bias)
    k, v = kv.unbind(2)
    return attend(q, k, v, None if bias is None else bias[:, None, None])


def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None = None) -> Tensor:
    """Attention among the tokens of every sequence, of which there are two dimensions.

    Args:
        packed: (R, r, n, 3, h, d), of any strides.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a sequence, from the first on, that are attended to.
        angles: (n, d/2, 2), rotary angles: q and k are turned by them after the norm. None: not at all.

    Returns:
        (R, r, n, h, d).
    """
    if library.usable(packed):
        return attention_ops.attend_packed(packed, norm, count, angles)
    q, k, v = normed_heads(packed.flatten(0, 1), norm)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return attend(q, k[:, :count], v[:, :count]).unflatten(0, packed.shape[:2])


def attend_neighbours(
    views: list[Tensor], norm: Tensor, count: int, neighbours: tuple[tuple[int, ...], ...]
) -> list[Tensor]:
    """Attention of every view to each of its neighbours, summed over these.

    Args:
        views: packed, each (R, n, 3, h, d).
        norm: as of ``attend_packed``; count alike.
        neighbours: for every view, those that it looks at.

    Returns:
        For each view (R, n, h, d).
    """
    if library.usable(views[0]):
        sums = attention_ops.attend_neighbours([view[None] for view in views], norm, count, list(chain(*neighbours)))
        return [each[0] for each in sums]
    return [sum(outputs[1:], outputs[0]) for outputs in neighbour_pairs(views, norm, count, neighbours)]


def neighbour_pairs(
    views: list[Tensor], norm: Tensor, count: int, neighbours: tuple[tuple[int, ...], ...]
) -> list[list[Tensor]]:
    """``attend_neighbours`` before the sum: for every view and each of its neighbours (R, n, h, d)."""
    heads = [normed_heads(view, norm) for view in views]
    return [
        [attend(heads[view][0], *(tensor[:, :count] for tensor in heads[other][1:])) for other in others]
        for view, others in enumerate(neighbours)
    ]


def normed_heads(packed: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with the RMS norm of every head, and v: (..., 3, h, d) -> (..., h, d) each."""
    return _NormedHeads.apply(packed, norm)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the channel pairs of ``x`` (R, n, h, d) by the places' ``angles`` (n, d/2, 2), computed in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(angles)[:, None]).flatten(-2).to(x.dtype)


class _NormedHeads(torch.autograd.Function):
    """Keeps the packed tensor and one factor a head: q and k after the norm are made again in the backward pass."""

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
