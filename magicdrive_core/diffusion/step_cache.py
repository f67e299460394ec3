"""What the blocks of one pass added to the tokens, added again at near noise levels instead of passing them anew.

The velocity of rectified flow changes slowly where noise levels lie close, as they do at the beginning of sampling
large videos. Whether a step is near is told by its noise level alone, so that all devices that share a clip agree, and
a sample depends on no other.
"""

from __future__ import annotations

from torch import Tensor


class StepCache:
    """Of one pass: conditional or not.

    Args:
        within: how far (of 1000) a noise level may lie below the one at which the blocks were passed.
    """

    def __init__(self, within: float) -> None:
        self._within = within
        self._level = float("inf")
        self._added: list[Tensor] = []

    def serves(self, level: Tensor) -> bool:
        """Whether the blocks need not be passed at a noise level (B), the same for all samples."""
        return self._level - float(level[0]) <= self._within

    def keep(self, level: Tensor, before: list[Tensor], after: list[Tensor]) -> None:
        """Takes note of tokens before and after all blocks."""
        self._level = float(level[0])
        self._added = [end - start for start, end in zip(before, after, strict=True)]

    def add_to(self, tokens: list[Tensor]) -> list[Tensor]:
        """Tokens as they are after all blocks, nearly."""
        return [start + added for start, added in zip(tokens, self._added, strict=True)]
