"""The costly steps of a block as single autograd functions, so that a training step keeps little and copies little.

Plain autograd would keep the modulated input of every linear map and what GELU gives. Here these are computed again in
the backward pass. In fp32 on a CPU the kernels are our own (native/). R stands for all leading dimensions but the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from magicdrive_core.kernels import library, row_ops

NORM_EPS = 1e-6
ROWS = 512

aten = torch.ops.aten


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift of ``x`` (..., B, T, S, C); ``shift`` and ``scale`` (C) or (B, T or 1, 1, C)."""
    if library.usable(x):
        return row_ops.modulate(x, shift, scale)
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear(LN(x) * (1 + scale) + shift): (R, C) -> (R, D).

    Args:
        x: (R, C), R = (..., B, T, S).
        shift: (C) or (B, T or 1, 1, C); scale alike.
        weight: (D, C); bias: (D) or None.
    """
    return _ModulatedLinear.apply(x, shift, scale, weight, bias)


def modulated_mlp(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> Tensor:
    """Linear(GELU(Linear(LN(x) * (1 + scale) + shift))), GELU in its tanh form: (R, C) -> (R, C)."""
    given = x, shift, scale, up, up_bias, down, down_bias
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in given)
    return _ModulatedMlp.apply(*given, trains)


def _gelu_backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x), and the gradient at x; ``gradient`` is used up."""
    if library.usable(x):
        return row_ops.gelu_backward(x, gradient), gradient
    return functional.gelu(x, approximate="tanh"), aten.gelu_backward(gradient, x, approximate="tanh")


def _modulate_backward(gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at x, shift and scale of ``modulate``."""
    if library.usable(x):
        return row_ops.modulate_backward(gradient, x, scale)
    normed, mean, deviation = aten.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)
    inner = gradient * (1 + scale)
    outer = aten.native_layer_norm_backward(inner, x, x.shape[-1:], mean, deviation, None, None, [True, False, False])[
        0
    ]
    return outer, gradient.sum_to_size(shift.shape), normed.mul_(gradient).sum_to_size(scale.shape)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shift, scale, weight)
        ctx.has_bias = bias is not None
        if library.usable(x) and row_ops.serves(weight):
            return row_ops.modulated_linear(x, shift, scale, weight, bias)
        return functional.linear(modulate(x, shift, scale), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        d_weight = rows.t() @ modulate(x, shift, scale).flatten(0, -2)
        dx, d_shift, d_scale = _modulate_backward((rows @ weight).view(x.shape), x, shift, scale)
        return dx, d_shift, d_scale, d_weight, rows.sum(0) if ctx.has_bias else None


class _ModulatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        trains: bool,
    ) -> Tensor:
        if library.usable(x) and row_ops.serves(up):
            out, hidden = row_ops.mlp(x, shift, scale, up, up_bias, down, down_bias, keep=trains)
        else:
            hidden = functional.linear(modulate(x, shift, scale).flatten(0, -2), up, up_bias)
            value = functional.gelu(hidden, approximate="tanh")
            if not trains:
                hidden = hidden.new_empty(0)  # frees what is four times the tokens
            out = functional.linear(value, down, down_bias).view(x.shape)
        ctx.save_for_backward(x, shift, scale, up, down, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, up, down, hidden = ctx.saved_tensors
        rows = _rows_at_once(x)
        inputs, d_z = modulate(x, shift, scale).flatten(0, -2), x.new_empty(x[..., 0].numel(), x.shape[-1])
        d_up, d_down, d_up_bias = torch.zeros_like(up), torch.zeros_like(down), up.new_zeros(len(up))
        for z, some, d_out, result in zip(
            *(tensor.split(rows) for tensor in (inputs, hidden, gradient.flatten(0, -2), d_z)), strict=True
        ):
            value, d_hidden = _gelu_backward(some, d_out @ down)
            d_down.addmm_(d_out.t(), value)
            d_up.addmm_(d_hidden.t(), z)
            d_up_bias.add_(d_hidden.sum(0))
            torch.mm(d_hidden, up, out=result)
        dx, d_shift, d_scale = _modulate_backward(d_z.view(x.shape), x, shift, scale)
        return dx, d_shift, d_scale, d_up, d_up_bias, d_down, gradient.flatten(0, -2).sum(0), None


def _rows_at_once(x: Tensor) -> int:
    """Rows of an MLP whose gradients are made in one piece: on a CPU so few that these stay in its cache."""
    return ROWS if x.device.type == "cpu" else max(1, x[..., 0].numel())
