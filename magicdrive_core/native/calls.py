"""Calls of the compiled functions with tensors: addresses and distances in place of shapes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from magicdrive_core.native.library import library

_LONG, _FLOATS = ctypes.c_int64, ctypes.c_void_p


class _Heads(ctypes.Structure):
    _fields_ = (("data", _FLOATS), *((name, _LONG) for name in ("outer", "inner", "token", "head")))

    @classmethod
    def of(cls, x: Tensor) -> _Heads:
        if x.stride(4) != 1:
            raise ValueError("the channels of a head must lie side by side")
        return cls(x.data_ptr(), *x.stride()[:4])


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("outer", "inner", "queries", "keys", "heads", "d")),
        *((name, _Heads) for name in ("q", "k", "v")),
        *((name, _FLOATS) for name in ("q_norm", "k_norm", "angles", "bias")),
    )


class Attention:
    """softmax(q k' / sqrt(d) + bias) v for q (outer, inner, n, h, d), k and v (outer, inner, m, h, d), fp32.

    Args:
        q: of any strides, the channels side by side; k and v alike.
        norm: (2, d), weights of RMS norms of q and k; None: neither has one.
        angles: (n, d / 2, 2), cosines and sines by which the channel pairs of q and k are turned after the norm; or None.
        bias: (outer * inner, m), added to the scores of every query; or None.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm: Tensor | None = None,
        angles: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        norm, angles, bias = (None if given is None else given.contiguous() for given in (norm, angles, bias))
        self._held = q, k, v, norm, angles, bias  # alive as long as their addresses are
        outer, inner, queries, heads, d = q.shape
        norms = (None, None) if norm is None else (norm.data_ptr(), norm.data_ptr() + d * norm.element_size())
        others = (None if given is None else given.data_ptr() for given in (angles, bias))
        sizes = outer, inner, queries, k.shape[2], heads, d
        self._given = _Attention(*sizes, *map(_Heads.of, (q, k, v)), *norms, *others)

    def forward(self, out: Tensor, *, add: bool = False) -> None:
        """Writes to ``out`` (outer, inner, n, h, d), or adds."""
        _call("attention", ctypes.byref(self._given), _Heads.of(out), int(add))

    def backward(
        self, gradient: Tensor, at: tuple[Tensor, Tensor, Tensor], norms: Tensor | None, add: tuple[bool, bool]
    ) -> None:
        """From the gradient at the output those at q, k and v.

        Args:
            gradient: (outer, inner, n, h, d).
            at: where the gradients at q, k and v go to, each shaped as it.
            norms: from ``new_norms``; the gradients at the norms are added.
            add: whether to add at q, and at k and v, instead of writing.
        """
        places = (_Heads.of(each) for each in at)
        norms_at = None if norms is None else ctypes.c_void_p(norms.data_ptr())
        flags = (int(each) for each in add)
        _call("attention_backward", ctypes.byref(self._given), _Heads.of(gradient), *places, norms_at, *flags)


def new_norms(norm: Tensor) -> Tensor:
    """(threads, 2, d) zeros: each thread adds to its own; the sum is the gradient at ``norm``."""
    return norm.new_zeros(torch.get_num_threads(), *norm.shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, period: int, out: Tensor) -> None:
    """LN(x) * (1 + scale) + shift of contiguous rows (R, C): row r has that of r / period % groups (groups, C)."""
    addresses = (ctypes.c_void_p(each.data_ptr()) for each in (x, shift, scale))
    sizes = (_LONG(size) for size in (*x.shape, period, len(shift)))
    _call("modulate", *addresses, *sizes, ctypes.c_void_p(out.data_ptr()))


def modulate_backward(gradient: Tensor, x: Tensor, scale: Tensor, period: int, at_x: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the gradient at ``x`` and returns those at shift and scale."""
    sums = x.new_zeros(torch.get_num_threads(), len(scale), 2, x.shape[1])
    addresses = (ctypes.c_void_p(each.data_ptr()) for each in (gradient, x, scale))
    sizes = (_LONG(size) for size in (*x.shape, period, len(scale)))
    _call("modulate_backward", *addresses, *sizes, *(ctypes.c_void_p(each.data_ptr()) for each in (at_x, sums)))
    return sums[:, :, 0].sum(0), sums[:, :, 1].sum(0)


def gelu_backward(x: Tensor, gradient: Tensor) -> None:
    """Makes of contiguous ``x`` GELU(x), and of the gradient there that at x."""
    addresses = (ctypes.c_void_p(each.data_ptr()) for each in (x, gradient))
    _call("gelu_backward", *addresses, _LONG(x.numel()))


def _call(name: str, *arguments: object) -> None:
    functions = library()
    assert functions is not None, "the callers ask before"
    getattr(functions, name)(*arguments, ctypes.c_int(torch.get_num_threads()))
