"""The six costly functions of a block, on the backend that serves a tensor's device and dtype.

The layers call these and know no backend: ``backend_of`` chooses it, in this one place. The C++ kernels serve fp32 on
a CPU (``cpp_ops.py``), torch's own operations everything else (``torch_ops.py``).

Linear maps and MLPs of modulated rows are single autograd functions, so that a training step keeps little and copies
little: plain autograd would keep the modulated input of every linear map and what GELU gives, which the backward pass
computes again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from magicdrive_core.kernels import cpp_ops, library, torch_ops

ROWS = 512


class Backend(Protocol):
    """What a backend offers to the functions of this module."""

    def attend_packed(self, packed: Tensor, norm: Tensor, count: int, angles: Tensor | None) -> Tensor:
        """Computes attention among the tokens of every sequence.

        Args:
            packed: (outer, inner, n, 3, h, d): q, k and v before their norm; of any strides but d's.
            norm: (2, d), weights of the RMS norms of q and k.
            count: tokens of a sequence, from the first on, that are attended to.
            angles: (n, d/2, 2), cosines and sines that turn q and k after the norm; None: they are not turned.

        Returns:
            (outer, inner, n, h, d).
        """

    def attend_neighbours(
        self, packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[Sequence[int]]
    ) -> Tensor:
        """Computes attention of every view to each of its neighbours in the same frame, summed over these.

        Args:
            packed: (B, V, T, n, 3, h, d): q, k and v before their norm.
            norm: (2, d), weights of the RMS norms of q and k.
            count: tokens of a frame, from the first on, that are attended to.
            neighbours: the views that each view attends to, equally many of each.

        Returns:
            (B, V, T, n, h, d).
        """

    def attend_context(self, q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
        """Computes attention to other tokens, whose keys and values are packed.

        Args:
            q: (R, n, h, d).
            kv: (R, m, 2, h, d): k, then v.
            bias: (R, m), added to the scores: 0, or -inf at what must not be attended to; None: all is attended to.

        Returns:
            (R, n, h, d).
        """

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Computes LN(x) * (1 + scale) + shift, LN without affine weights.

        Args:
            x: (..., C).
            shift: broadcastable against ``x``, see ``functions.modulate``.
            scale: shaped like ``shift``.

        Returns:
            (..., C).
        """

    def modulate_backward(
        self, gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the gradients of ``modulate``.

        Args:
            gradient: (..., C), gradient at the result of ``modulate``.
            x: (..., C), argument of ``modulate``.
            shift: argument of ``modulate``, broadcastable against ``x``.
            scale: shaped like ``shift``.

        Returns:
            The gradients at ``x``, ``shift`` and ``scale``, each shaped like its tensor.
        """

    def linear(self, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes Linear(LN(x) * (1 + scale) + shift), the forward pass of ``modulated_linear``.

        Args:
            x: (..., C).
            shift: broadcastable against ``x``, see ``functions.modulate``.
            scale: shaped like ``shift``.
            weight: (D, C).
            bias: (D); None: the map has none.

        Returns:
            (..., D).
        """

    def mlp(
        self,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        keep: bool,
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

    def gelu_backward(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Computes GELU again and its gradient, in the tanh form.

        Args:
            x: (R, D), GELU's input.
            gradient: (R, D), gradient at GELU's output; may be written over.

        Returns:
            GELU(x), and the gradient at ``x``, (R, D) each.
        """


def backend_of(x: Tensor) -> Backend:
    """Chooses the backend for tensors of the device and dtype of ``x``.

    Args:
        x: any tensor of the computation.

    Returns:
        The C++ kernels for fp32 on a CPU where they compile, else torch's own operations.
    """
    return cpp_ops if library.usable(x) else torch_ops


def attend_packed(packed: Tensor, norm: Tensor, count: int, angles: Tensor | None = None) -> Tensor:
    """Computes attention among the tokens of every sequence; sequences have two dimensions.

    Args:
        packed: (outer, inner, n, 3, h, d): q, k and v before their norm; of any strides but d's.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a sequence, from the first on, that are attended to.
        angles: (n, d/2, 2), rotary angles: q and k are turned by them after the norm; None: not at all.

    Returns:
        (outer, inner, n, h, d).
    """
    return backend_of(packed).attend_packed(packed, norm, count, angles)


def attend_neighbours(packed: Tensor, norm: Tensor, count: int, neighbours: Sequence[Sequence[int]]) -> Tensor:
    """Computes attention of every view to each of its neighbours in the same frame, summed over these.

    Args:
        packed: (B, V, T, n, 3, h, d): q, k and v before their norm.
        norm: (2, d), weights of the RMS norms of q and k.
        count: tokens of a frame, from the first on, that are attended to.
        neighbours: for every view, those that it attends to, equally many of each.

    Returns:
        (B, V, T, n, h, d).
    """
    return backend_of(packed).attend_neighbours(packed, norm, count, neighbours)


def attend_context(q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
    """Computes attention to other tokens, whose keys and values are packed.

    Args:
        q: (R, n, h, d).
        kv: (R, m, 2, h, d).
        bias: (R, m), 0 or -inf: what must not be attended to; or None.

    Returns:
        (R, n, h, d).
    """
    return backend_of(q).attend_context(q, kv, bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Computes LN(x) * (1 + scale) + shift, LN without affine weights.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, as (C) or (B, 1, T or 1, 1, C) against (B, V, T, S, C).
        scale: shaped like ``shift``.

    Returns:
        (..., C).
    """
    return backend_of(x).modulate(x, shift, scale)


def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes Linear(LN(x) * (1 + scale) + shift) as one autograd function.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``modulate``.
        scale: shaped like ``shift``.
        weight: (D, C).
        bias: (D); None: the map has none.

    Returns:
        (..., D).
    """
    return _ModulatedLinear.apply(x, shift, scale, weight, bias)


def modulated_mlp(
    x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> Tensor:
    """Computes Linear(GELU(Linear(LN(x) * (1 + scale) + shift))), GELU in its tanh form, as one autograd function.

    Args:
        x: (..., C).
        shift: broadcastable against ``x``, see ``modulate``.
        scale: shaped like ``shift``.
        up: (D, C), weight of the first linear map.
        up_bias: (D).
        down: (C, D), weight of the second linear map.
        down_bias: (C).

    Returns:
        (..., C).
    """
    tensors = x, shift, scale, up, up_bias, down, down_bias
    trains = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    return _ModulatedMlp.apply(*tensors, trains)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, shift, scale, weight)
        ctx.has_bias = bias is not None
        return backend_of(x).linear(x, shift, scale, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight = ctx.saved_tensors
        backend = backend_of(x)
        rows = gradient.flatten(0, -2)
        d_weight = None
        if ctx.needs_input_grad[3]:  # a frozen weight needs none, which is a third of the work
            d_weight = rows.t() @ backend.modulate(x, shift, scale).flatten(0, -2)
        dx, d_shift, d_scale = backend.modulate_backward((rows @ weight).view(x.shape), x, shift, scale)
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
        out, hidden = backend_of(x).mlp(x, shift, scale, up, up_bias, down, down_bias, keep=trains)
        ctx.save_for_backward(x, shift, scale, up, down, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, up, down, hidden = ctx.saved_tensors
        backend = backend_of(x)
        rows = _rows_at_once(x)
        inputs, d_z = backend.modulate(x, shift, scale).flatten(0, -2), x.new_empty(x[..., 0].numel(), x.shape[-1])
        trains_up, trains_down = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        d_up, d_down, d_up_bias = torch.zeros_like(up), torch.zeros_like(down), up.new_zeros(len(up))
        for z, some, d_out, result in zip(
            *(tensor.split(rows) for tensor in (inputs, hidden, gradient.flatten(0, -2), d_z)), strict=True
        ):
            value, d_hidden = backend.gelu_backward(some, d_out @ down)
            if trains_down:
                d_down.addmm_(d_out.t(), value)
            if trains_up:
                d_up.addmm_(d_hidden.t(), z)
            d_up_bias.add_(d_hidden.sum(0))
            torch.mm(d_hidden, up, out=result)
        dx, d_shift, d_scale = backend.modulate_backward(d_z.view(x.shape), x, shift, scale)
        return dx, d_shift, d_scale, d_up, d_up_bias, d_down, gradient.flatten(0, -2).sum(0), None


def _rows_at_once(x: Tensor) -> int:
    """Rows of an MLP whose gradients are computed in one piece: on a CPU so few that these stay in its cache."""
    return ROWS if x.device.type == "cpu" else max(1, x[..., 0].numel())
