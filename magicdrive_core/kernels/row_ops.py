"""Norms, linear maps and MLPs of rows as operations of torch, which go through FakeTensorMode, export and compile.

fp32 on a CPU. Only ``modulate`` has a gradient of its own here; the others are steps of functions that have
(model/kernels.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magicdrive_core.kernels import calls
from magicdrive_core.kernels.calls import WIDTHS, Modulation


@torch.library.custom_op("magicdrive::modulate", mutates_args=(), device_types="cpu")
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift.

    Args:
        x: (..., C).
        shift: broadcastable against x, for rows that follow each other, as (B, T or 1, 1, C) for (..., B, T, S, C);
            scale of the same shape.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    _modulation(x, shift, scale).forward(_rows(x), out)
    return out


@torch.library.custom_op("magicdrive::modulate_backward", mutates_args=(), device_types="cpu")
def modulate_backward(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient at what ``modulate`` gave those at x, shift and scale."""
    gradient, x = gradient.contiguous(), x.contiguous()
    at_x = torch.empty_like(x)
    at_shift, at_scale = _modulation(x, scale, scale).backward(gradient, _rows(x), at_x)
    return at_x, at_shift.view(scale.shape), at_scale.view(scale.shape)


@torch.library.custom_op("magicdrive::modulated_linear", mutates_args=(), device_types="cpu")
def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear(LN(x) * (1 + scale) + shift).

    Args:
        x: (..., C); shift and scale as of ``modulate``.
        weight: (D, C); bias (D) or None.

    Returns:
        (..., D).
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    x = x.contiguous()
    _modulation(x, shift, scale).linear(_rows(x), weight.contiguous(), bias, out)
    return out


@torch.library.custom_op("magicdrive::mlp", mutates_args=(), device_types="cpu")
def mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Linear(GELU(Linear(LN(x) * (1 + scale) + shift))), GELU in its tanh form.

    Args:
        x: (..., C); shift and scale as of ``modulate``.
        up: (D, C), up_bias (D), down (C, D), down_bias (C).
        keep: whether to give what GELU was given.

    Returns:
        (..., C), and (R, D) or nothing, R all of '...'.
    """
    x = x.contiguous()
    out, hidden = torch.empty_like(x), x.new_empty(_hidden_shape(x, up, keep))
    maps = (up.contiguous(), up_bias), (down.contiguous(), down_bias)
    _modulation(x, shift, scale).mlp(_rows(x), *maps, hidden if keep else None, out)
    return out, hidden


def serves(weight: Tensor) -> bool:
    """Whether ``modulated_linear`` and ``mlp`` know linear maps of these sizes (D, C)."""
    return weight.shape[0] % WIDTHS == 0 and weight.shape[1] % WIDTHS == 0


@torch.library.custom_op("magicdrive::gelu_backward", mutates_args=("gradient",), device_types="cpu")
def gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    """GELU(x), and makes of the gradient there that at x; both contiguous."""
    value = torch.empty_like(x)
    calls.gelu_backward(x, gradient, value)
    return value


@modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@modulate_backward.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@modulated_linear.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@mlp.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(_hidden_shape(x, up, keep))


@gelu_backward.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_modulated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale = inputs
    ctx.save_for_backward(x, scale)


def _from_modulated(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return modulate_backward(gradient, *ctx.saved_tensors)


modulate.register_autograd(_from_modulated, setup_context=_keep_modulated)


# Shapes


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (R, C), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _hidden_shape(x: Tensor, up: Tensor, keep: bool) -> tuple[int, int]:
    return x[..., 0].numel() if keep else 0, up.shape[0]


def _modulation(x: Tensor, shift: Tensor, scale: Tensor) -> Modulation:
    return Modulation(_rows(shift), _rows(scale), _period(x, shift))


def _period(x: Tensor, modulation: Tensor) -> int:
    """Rows of ``x`` in a row with one modulation.

    Raises:
        ValueError: rows with one modulation do not follow each other.
    """
    given, sizes = list(modulation.shape[:-1]), list(x.shape[:-1])
    period = 1
    while sizes and (not given or given[-1] == 1):
        period *= sizes.pop()
        given = given[:-1]
    while given and given[0] == 1:  # the same for all that is further out
        given = given[1:]
    if given != sizes[len(sizes) - len(given) :]:
        raise ValueError(f"a modulation of {tuple(modulation.shape)} is not of rows in a row of {tuple(x.shape)}")
    return period
