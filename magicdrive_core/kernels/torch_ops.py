"""The kernels' functions by torch's own operations: any device, any dtype. What the C++ kernels compute, in the open.

Every function of ``Backend`` in ``functions.py`` is here; Args and shapes are documented there.
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
    """Backend of ``functions.attend_context``."""
    k, v = kv.unbind(2)
    return attend(q, k, v, None if bias is None else bias[:, None, None])


def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
    """Backend of ``functions.attend_packed``."""
    q, k, v = normed_heads(packed.flatten(0, 1), norm)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return attend(q, k[:, :count], v[:, :count]).unflatten(0, packed.shape[:2])


def attend_neighbours(packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[Sequence[int]]) -> Tensor:
    """Backend of ``functions.attend_neighbours``."""
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
    """Splits (..., 3, h, d) into q and k with the RMS norm of every head, and v: (..., h, d) each."""
    return _NormedHeads.apply(packed, norm)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the channel pairs of ``x`` (R, n, h, d) by the tokens' ``angles`` (n, d/2, 2), computed in fp32."""
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
    """Backend of ``functions.modulate``."""
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def modulate_backward(gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at x, shift and scale of ``modulate``."""
    normed, mean, deviation = aten.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
    inner = gradient * (1 + scale)
    outer = aten.native_layer_norm_backward(inner, x, x.shape[-1:], mean, deviation, None, None, [True, False, False])[
        0
    ]
    return outer, gradient.sum_to_size(shift.shape), normed.mul_(gradient).sum_to_size(scale.shape)


def linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Forward pass of ``functions.modulated_linear``."""
    return functional.linear(modulate(x, shift, scale), weight, bias)


def mlp(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Forward pass of ``functions.modulated_mlp``, and GELU's input (R, D); empty unless ``keep``."""
    return mlp_of(modulate(x, shift, scale), up, up_bias, down, down_bias, keep)


def mlp_of(
    modulated: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """``mlp`` of rows that are already modulated."""
    hidden = functional.linear(modulated.flatten(0, -2), up, up_bias)
    value = functional.gelu(hidden, approximate="tanh")
    if not keep:
        hidden = hidden.new_empty(0)  # frees what is four times the tokens
    return functional.linear(value, down, down_bias).view(modulated.shape), hidden


def gelu_backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x), and the gradient at x."""
    return functional.gelu(x, approximate="tanh"), aten.gelu_backward(gradient, x, approximate="tanh")
