"""The step cache: at near noise levels, what all blocks added to the tokens is added again instead of computed.

The velocity of rectified flow changes slowly where noise levels are close together, as at the start of sampling large
videos. Whether a level is near depends on nothing else, so that ranks that share a clip agree, and a sample depends on
no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class StepCache:
    """The increments of one pass, conditional or not.

    Args:
        within: how far (of 1000) a noise level may be below the one at which the blocks last ran.
    """

    def __init__(self, within: float) -> None:
        self._within = within
        self._level = float("inf")
        self._added: Tensor | None = None

    def __call__(self, trunk: Callable[..., Tensor], level: float, x: Tensor, *rest: Any) -> Tensor:
        """Runs the blocks, or adds what they added before.

        Args:
            trunk: maps tokens, and the other arguments, to tokens of the same shape; it may write over its tokens.
            level: noise level of all samples, in [0, 1000].
            x: tokens of any shape; they are not written over.
            *rest: other arguments of ``trunk``.

        Returns:
            Tokens after all blocks, shaped like ``x``; approximate where the increment of an earlier level was added.
        """
        if self._added is not None and self._level - level <= self._within:
            return x + self._added
        self._added = None  # frees it while the blocks run
        out = trunk(x.clone(), *rest)
        self._level, self._added = level, out - x
        return out
