"""Classifier-free guidance. Ho and Salimans, "Classifier-free diffusion guidance" (2022)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Leads the velocity away from the unconditional one: v = v_null + scale (v_cond - v_null).

    Args:
        conditional: v_cond.
        unconditional: v_null, of the same shape.
        scale: 1 gives v_cond.
    """
    return unconditional + scale * (conditional - unconditional)
