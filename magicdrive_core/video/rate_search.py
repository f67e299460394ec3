"""The search for the best quality whose file stays under a cap on its bit rate."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

# Qualities are x264's constant rate factors: lower is better. At 12, with 47 dB on street views, nobody sees a
# difference to the source.
BEST_QUALITY, START_QUALITY, WORST_QUALITY = 12.0, 16.0, 51.0
OCTAVE = 5.5  # difference of rate factors that halves the bit rate of common content
CLOSE_ENOUGH = 0.92  # share of the cap from which a file is not worth another pass
AIM = 0.96  # share of the cap that the search aims at: the middle of what is close enough
FINEST = 0.05  # difference of rate factors below which the search ends
MARGIN = 0.1  # least distance of the next quality to both sides, as a share of the distance between them


@dataclass
class _Side:
    """The quality nearest to the cap on one side of it.

    Attributes:
        quality: constant rate factor.
        octaves: log2 of its bit rate over the aimed one, negative below; halved while only the other side moves.
    """

    quality: float
    octaves: float


class RateSearch:
    """One search: regula falsi on the logarithm of the bit rate, in the Illinois variant (Dowell and Jarratt 1971).

    Bit rates fall as the rate factor rises, nearly always; an exception costs passes but never breaks the cap.

    Args:
        cap: highest bit rate in Mbit/s.
        start: first quality to try; the better the guess, the fewer passes.

    Attributes:
        done: whether no further pass is worth its time.
        infeasible: whether even the worst quality is over the cap.
        best_quality: quality of the largest file under the cap.
    """

    def __init__(self, cap: float, start: float = START_QUALITY) -> None:
        self.done = self.infeasible = False
        self.best_quality = start
        self.cap, self._start = cap, start
        self._best = 0.0  # Mbit/s
        self._over: _Side | None = None
        self._under: _Side | None = None
        self._last_was_over = False

    def record(self, quality: float, mbit_s: float) -> bool:
        """Takes the measured bit rate of a pass into account.

        Args:
            quality: rate factor of the pass, from ``next_quality``.
            mbit_s: bit rate of its file.

        Returns:
            Whether the file is the best one under the cap so far.
        """
        made, is_over = _Side(quality, log2(mbit_s / (AIM * self.cap))), mbit_s > self.cap
        stale = self._under if is_over else self._over
        if stale and is_over == self._last_was_over:
            stale.octaves /= 2
        self._last_was_over = is_over
        if is_over:
            self._over = made
            self.infeasible = quality >= WORST_QUALITY
            return False
        self._under = made
        self.done = (
            mbit_s >= CLOSE_ENOUGH * self.cap
            or quality <= BEST_QUALITY
            or (self._over is not None and quality - self._over.quality <= FINEST)
        )
        if mbit_s <= self._best:
            return False
        self._best, self.best_quality = mbit_s, quality
        return True

    def next_quality(self) -> float:
        """Returns the rate factor to try next: ``start`` first, then between the nearest ones over and under the cap.

        While all passes are on one side of the cap, the step follows ``OCTAVE``, within ``BEST_QUALITY`` and
        ``WORST_QUALITY``.
        """
        over, under = self._over, self._under
        if over and under:
            share = over.octaves / (over.octaves - under.octaves) if under.octaves < over.octaves else 0.5
            return over.quality + min(1 - MARGIN, max(MARGIN, share)) * (under.quality - over.quality)
        if over:
            return min(WORST_QUALITY, over.quality + max(0.3, OCTAVE * over.octaves))
        if under:
            return max(BEST_QUALITY, under.quality + min(-0.3, OCTAVE * under.octaves))
        return self._start
