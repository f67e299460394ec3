"""A training's losses in two numbers: where they began and where they ended."""

from __future__ import annotations

from collections.abc import Sequence

STEADY = 8  # losses: the mean of fewer says more about which noise levels were drawn than about the network


def first_and_last(losses: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth; where that is fewer than eight losses, of eight or of half of all."""
    count = max(len(losses) // 10, min(STEADY, len(losses) // 2), 1)
    return sum(losses[:count]) / count, sum(losses[-count:]) / count
