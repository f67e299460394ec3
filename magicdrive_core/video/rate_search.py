"""The search for the best quality whose file stays under a cap on its bit rate."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

# x264's constant rate factor: lower is better. At 12 (47 dB on street views) nobody sees a difference to the source.
BEST, START, WORST = 12.0, 16.0, 51.0
OCTAVE = 5.5  # of rate factor: what halves the rate of common content
CLOSE_ENOUGH = 0.92  # of the cap: nearer is not worth another pass
AIM = 0.96  # of the cap: the middle of what is close enough
FINEST = 0.05  # of rate factor: no search between two that are closer
MARGIN = 0.1  # of the way between two qualities that the next one keeps from either


@dataclass
class _Side:
    """The quality nearest to the cap on one side of it."""

    quality: float  # constant rate factor
    octaves: float  # of its rate above the aim (below: negative); halved while the other side alone gets nearer


class RateSearch:
    """One search, told of every try: false position through the logarithms of rates, the Illinois way.

    Rates fall as the rate factor rises, nearly: a try that breaks the rule costs passes, never the cap.

    Args:
        cap: Mbit/s.
        start: the first quality to try; the better the guess, the fewer the passes.

    Attributes:
        done: whether no further pass is worth its time.
        hopeless: whether even the worst quality is over the cap.
        best_quality: of the largest file under the cap.
    """

    def __init__(self, cap: float, start: float = START) -> None:
        self.done = self.hopeless = False
        self.best_quality = start
        self.cap, self._start = cap, start
        self._best = 0.0  # Mbit/s
        self._over: _Side | None = None
        self._under: _Side | None = None
        self._last_was_over = False

    def tell(self, quality: float, mbit_s: float) -> bool:
        """Takes note of a try of ``next_quality``; whether its file is the best under the cap so far."""
        made, is_over = _Side(quality, log2(mbit_s / (AIM * self.cap))), mbit_s > self.cap
        stale = self._under if is_over else self._over
        if stale and is_over == self._last_was_over:
            stale.octaves /= 2
        self._last_was_over = is_over
        if is_over:
            self._over = made
            self.hopeless = quality >= WORST
            return False
        self._under = made
        self.done = (
            mbit_s >= CLOSE_ENOUGH * self.cap
            or quality <= BEST
            or (self._over is not None and quality - self._over.quality <= FINEST)
        )
        if mbit_s <= self._best:
            return False
        self._best, self.best_quality = mbit_s, quality
        return True

    def next_quality(self) -> float:
        """The rate factor to try next."""
        over, under = self._over, self._under
        if over and under:
            share = over.octaves / (over.octaves - under.octaves) if under.octaves < over.octaves else 0.5
            return over.quality + min(1 - MARGIN, max(MARGIN, share)) * (under.quality - over.quality)
        if over:
            return min(WORST, over.quality + max(0.3, OCTAVE * over.octaves))
        if under:
            return max(BEST, under.quality + min(-0.3, OCTAVE * under.octaves))
        return self._start
