"""Attention among tokens whose q, k and v lie packed as one linear map gives them, with an RMS norm on q and k.

For the backward pass only the packed tensor and what attention gave are kept: normalised and turned q and k are made
again. For that, attention on a CPU is torch's flash kernel called by name; elsewhere torch chooses the kernel, and
keeps what that one needs.

Packed is (R, n, 3, h, d): R sequences of n tokens, h heads of d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from magicdrive_core.model.kernels import NORM_EPS

aten = torch.ops.aten


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


def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None = None) -> Tensor:
    """Attention among the tokens of every sequence.

    Args:
        packed: (R, n, 3, h, d).
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a sequence, from the first on, that are attended to.
        angles: (n, d/2, 2), rotary angles: q and k are turned by them after the norm. None: not at all.

    Returns:
        (R, n, h, d).
    """
    if _trains_on_cpu(packed):
        return _SelfAttention.apply(packed, norm, count, angles)
    q, k, v = normed_heads(packed, norm)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return attend(q, k[:, :count], v[:, :count])


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
    if _trains_on_cpu(views[0]):
        return list(_NeighbourAttention.apply(norm, count, neighbours, *views))
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
    return _turned(x, torch.view_as_complex(angles))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)


def _trains_on_cpu(packed: Tensor) -> bool:
    return packed.device.type == "cpu" and torch.is_grad_enabled() and packed.requires_grad


class _Heads(NamedTuple):
    """q and k after the norm, v, and the norm's factors (..., 2, h, 1)."""

    q: Tensor
    k: Tensor
    v: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, packed: Tensor, norm: Tensor) -> _Heads:
        inverse = (packed[..., :2, :, :].float().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt_().to(packed.dtype)
        return cls.again(packed, norm, inverse)

    @classmethod
    def again(cls, packed: Tensor, norm: Tensor, inverse: Tensor) -> _Heads:
        q, k = ((packed[..., i, :, :] * inverse[..., i, :, :]).mul_(norm[i]) for i in range(2))
        return cls(q, k, packed[..., 2, :, :], inverse)


def _norm_backward(packed: Tensor, norm: Tensor, inverse: Tensor, gradients: Sequence[Tensor], out: Tensor) -> Tensor:
    """Writes the gradient at ``packed`` to ``out`` and returns that at ``norm``.

    The gradients of k and v may be of the first tokens only; the others are not attended to.
    """
    d_norm = []
    for i, gradient in enumerate(gradients):
        out[:, gradient.shape[1] :, i] = 0
        some = out[:, : gradient.shape[1], i]
        if i == 2:
            some.copy_(gradient)
            continue
        factor = inverse[:, : gradient.shape[1], i]
        normed = packed[:, : gradient.shape[1], i] * factor
        d_norm.append((gradient * normed).sum_to_size(norm.shape[-1:]))
        inner = gradient * norm[i]
        inner.sub_(normed.mul_((inner * normed).mean(-1, keepdim=True)))
        torch.mul(inner, factor, out=some)
    return torch.stack(d_norm)


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, inverse = _Heads.of(packed, norm)
        ctx.save_for_backward(packed, norm, inverse)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        packed, norm, inverse = ctx.saved_tensors
        gradient = torch.empty_like(packed)
        return gradient, _norm_backward(packed, norm, inverse, (dq, dk, dv), gradient)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``attend``, and what its backward pass needs besides: the scores' log-sum-exp."""
    out, scores = aten._scaled_dot_product_flash_attention_for_cpu(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2), scores


def _flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x.transpose(1, 2) for x in (gradient, q, k, v, out))
    parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, scores, 0.0, False)
    return tuple(part.transpose(1, 2) for part in parts)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
        q, k, v, inverse = _Heads.of(packed, norm)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out, scores = _flash(q, k[:, :count], v[:, :count])
        ctx.save_for_backward(packed, norm, inverse, angles, out, scores)
        ctx.count = count
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, norm, inverse, angles, out, scores = ctx.saved_tensors
        q, k, v, _ = _Heads.again(packed, norm, inverse)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        dq, dk, dv = _flash_backward(gradient, q, k[:, : ctx.count], v[:, : ctx.count], out, scores)
        if angles is not None:
            back = torch.view_as_complex(angles).conj()
            dq, dk = _turned(dq, back), _turned(dk, back)
        at_packed = torch.empty_like(packed)
        return at_packed, _norm_backward(packed, norm, inverse, (dq, dk, dv), at_packed), None, None


class _NeighbourAttention(torch.autograd.Function):
    """Of each view (R, n, 3, h, d); gives (R, n, h, d) for each."""

    @staticmethod
    def forward(
        ctx: Any, norm: Tensor, count: int, neighbours: tuple[tuple[int, ...], ...], *views: Tensor
    ) -> tuple[Tensor, ...]:
        heads = [_Heads.of(view, norm) for view in views]
        sums, kept = [], []
        for view, others in enumerate(neighbours):
            q = heads[view].q
            pairs = [_flash(q, heads[other].k[:, :count], heads[other].v[:, :count]) for other in others]
            sums.append(sum((out for out, _ in pairs[1:]), pairs[0][0]))
            kept += [tensor for pair in pairs for tensor in pair]
        ctx.save_for_backward(norm, *views, *(each.inverse for each in heads), *kept)
        ctx.count, ctx.neighbours = count, neighbours
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        norm, *saved = ctx.saved_tensors
        number, count = len(gradients), ctx.count
        views, inverses, kept = saved[:number], saved[number : 2 * number], iter(saved[2 * number :])
        heads = [_Heads.again(view, norm, inverse) for view, inverse in zip(views, inverses, strict=True)]
        sums: list[dict[int, Tensor]] = [{} for _ in views]  # gradients of q, k and v
        for view, others in enumerate(ctx.neighbours):
            for other in others:
                k, v = heads[other].k[:, :count], heads[other].v[:, :count]
                parts = _flash_backward(gradients[view], heads[view].q, k, v, next(kept), next(kept))
                for i, (place, part) in enumerate(zip((view, other, other), parts, strict=True)):
                    sums[place][i] = sums[place][i].add_(part) if i in sums[place] else part
        d_norm, at_views = torch.zeros_like(norm), []
        for packed, inverse, sum_of in zip(views, inverses, sums, strict=True):
            at_view = torch.empty_like(packed)
            d_norm += _norm_backward(packed, norm, inverse, [sum_of[i] for i in range(3)], at_view)
            at_views.append(at_view)
        return d_norm, None, None, *at_views
