"""What the kernels compute, as plain formulas of torch in any dtype, and how far a result may be from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """(..., n, h, d) by (n, d / 2, 2)."""
    a, b = x[..., ::2], x[..., 1::2]
    cosine, sine = angles[:, None].unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., n, h, d), (..., m, h, d) twice and (..., m) -> (..., n, h, d)."""
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias[..., None, None, :]
    return torch.einsum("...hnm,...mhd->...nhd", scores.softmax(-1), v)


def packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
    q, k, v = packed.unbind(-3)
    q, k = normed(q, norm[0]), normed(k, norm[1])
    if angles is not None:
        q, k = turned(q, angles), turned(k, angles)
    return attention(q, k[..., :count, :, :], v[..., :count, :, :])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def assert_as_in_fp64(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], tensors: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    """The result and the gradients at ``tensors`` are those of ``formula`` in fp64, but for rounding."""
    single = [tensor.detach().requires_grad_() for tensor in tensors]
    double = [tensor.detach().double().requires_grad_() for tensor in tensors]
    result, expected = ours(*single), formula(*double)
    close(result, expected, tolerance)
    gradient = torch.randn(expected.shape)
    gradients = torch.autograd.grad(result, single, gradient)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, double, gradient.double()), strict=True):
        close(got, wanted, tolerance)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    largest = float(wanted.detach().abs().max())
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * max(1.0, largest))
