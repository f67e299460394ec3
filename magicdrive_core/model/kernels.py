"""The costly steps of a block as single autograd functions, so that a training step keeps little and copies little.

Plain autograd would keep the modulated input of every linear map and the MLP's activations. Here the cheap ones are
computed again in the backward pass. R stands for all leading dimensions but the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from magicdrive_core.native import ops as native

NORM_EPS = 1e-6
GELU_SCALE = 1.5957691216057308  # 2 sqrt(2 / pi)
GELU_CUBE = 0.044715 * GELU_SCALE
ROWS = 512
# Whether oneDNN's linear map with GELU in it is the faster way: its tanh is slow without AVX-512 (docs/log.md).
ONEDNN_GELU = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"

aten = torch.ops.aten


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift of ``x`` (..., B, T, S, C); ``shift`` and ``scale`` (C) or (B, T or 1, 1, C)."""
    if native.usable(x):
        return native.modulate(x, shift, scale)
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
    return _ModulatedMlp.apply(x, shift, scale, up, up_bias, down, down_bias)


def gelu(x: Tensor) -> Tensor:
    """GELU's tanh form, x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3): half the time of tanh on a CPU."""
    return _gelu_gate(x).mul_(x) if x.device.type == "cpu" else functional.gelu(x, approximate="tanh")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(Linear(x)): (R, C) -> (R, D)."""
    if ONEDNN_GELU and x.device.type == "cpu" and x.dtype != torch.float64:  # which oneDNN does not know
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
    return gelu(functional.linear(x, weight, bias))


def _gelu_gate(x: Tensor) -> Tensor:
    return torch.addcmul(x.new_tensor(GELU_SCALE), x, x, value=GELU_CUBE).mul_(x).sigmoid_()


def _gelu_backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x), and the gradient at x; both may take the place of what was given."""
    if native.usable(x):
        native.gelu_backward(x, gradient)
        return x, gradient
    gate = _gelu_gate(x)
    value = x * gate
    slope = torch.addcmul(x.new_tensor(GELU_SCALE), x, x, value=3 * GELU_CUBE).mul_(value)
    return value, torch.addcmul(slope, slope, gate, value=-1).add_(gate).mul_(gradient)


def _modulate_backward(gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at x, shift and scale of ``modulate``."""
    if native.usable(x):
        return native.modulate_backward(gradient, x, scale)
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
    """In pieces of rows: activations that are made, used and dropped in cache cost a third of the time.

    On a CPU the backward pass makes the hidden activations, four times the tokens, again: a sixth of what a training
    step keeps, for a twentieth of its time. Elsewhere blocks are checkpointed where memory is short.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
    ) -> Tensor:
        pieces = modulate(x, shift, scale).flatten(0, -2).split(_rows_at_once(x))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        hidden = []
        for z, result in zip(pieces, out.flatten(0, -2).split(_rows_at_once(x)), strict=True):
            if any(ctx.needs_input_grad) and _keeps_hidden(x):
                hidden.append(functional.linear(z, up, up_bias))
                value = gelu(hidden[-1])
            else:
                value = gelu_linear(z, up, up_bias)
            torch.addmm(down_bias, value, down.t(), out=result)
        ctx.save_for_backward(x, shift, scale, up, up_bias, down, *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, shift, scale, up, up_bias, down, *hidden = ctx.saved_tensors
        rows = _rows_at_once(x)
        pieces = modulate(x, shift, scale).flatten(0, -2).split(rows)
        d_up, d_down, d_up_bias = torch.zeros_like(up), torch.zeros_like(down), up.new_zeros(len(up))
        d_z = x.new_empty(x.shape).flatten(0, -2)
        activations = hidden or (functional.linear(z, up, up_bias) for z in pieces)
        parts = zip(pieces, activations, gradient.flatten(0, -2).split(rows), d_z.split(rows), strict=True)
        for z, activation, d_out, result in parts:
            value, d_hidden = _gelu_backward(activation, d_out @ down)
            d_down.addmm_(d_out.t(), value)
            d_up.addmm_(d_hidden.t(), z)
            d_up_bias.add_(d_hidden.sum(0))
            torch.mm(d_hidden, up, out=result)
        dx, d_shift, d_scale = _modulate_backward(d_z.view(x.shape), x, shift, scale)
        return dx, d_shift, d_scale, d_up, d_up_bias, d_down, gradient.flatten(0, -2).sum(0)


def _keeps_hidden(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _rows_at_once(x: Tensor) -> int:
    """Rows of an MLP in one piece: on a CPU so few that the hidden activations stay in its cache."""
    return ROWS if x.device.type == "cpu" else max(1, x[..., 0].numel())
