"""Classifier-free guidance. Ho and Salimans, "Classifier-free diffusion guidance" (2022)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Leads the velocity away from the unconditional one: v = v_null + scale (v_cond - v_null).

    Args:
        conditional: v_cond, of any shape.
        unconditional: v_null, of the same shape.
        scale: guidance scale; 1 gives v_cond, 0 gives v_null.

    Returns:
        v, of the same shape.
    """
    return unconditional + scale * (conditional - unconditional)
