"""The search ends under the cap after few passes, for any relation of quality and bit rate."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.video.rate_search import (
    BEST_QUALITY,
    CLOSE_ENOUGH,
    FINEST,
    START_QUALITY,
    WORST_QUALITY,
    RateSearch,
)

octaves = st.lists(st.floats(0.05, 6), min_size=10, max_size=10)


def rate_at(quality: float, falls: list[float], lowest: float) -> float:
    """Returns the Mbit/s of content whose rate falls by ``falls`` octaves from the best to the worst quality."""
    heights = log2(lowest) + sum(falls) - np.cumsum([0, *falls])
    return float(2 ** np.interp(quality, np.linspace(BEST_QUALITY, WORST_QUALITY, len(heights)), heights))


def run(search: RateSearch, falls: list[float], lowest: float) -> list[tuple[float, float, bool]]:
    """Returns quality, rate and whether it is the best so far, for each pass."""
    tries = []
    while not search.done and not search.infeasible:
        quality = search.next_quality()
        rate = rate_at(quality, falls, lowest)
        tries.append((quality, rate, search.record(quality, rate)))
    return tries


@given(falls=octaves, lowest=st.floats(0.001, 20), start=st.floats(BEST_QUALITY, WORST_QUALITY))
def test_the_result_is_under_the_cap_and_as_near_as_promised(falls: list[float], lowest: float, start: float) -> None:
    search = RateSearch(4.0, start)
    tries = run(search, falls, lowest)
    assert len(tries) <= 25
    kept = [(quality, rate) for quality, rate, best in tries if best]
    if lowest > 4.0:
        assert search.infeasible
        assert not kept
        return
    quality, rate = kept[-1]
    assert rate <= 4.0
    assert quality == search.best_quality
    steep = rate_at(max(BEST_QUALITY, quality - FINEST), falls, lowest) > 4.0
    assert rate >= CLOSE_ENOUGH * 4.0 or quality == BEST_QUALITY or steep


@pytest.mark.parametrize("octave", [4.5, 5.5, 6.5])
def test_a_good_start_makes_one_pass_enough_and_a_fair_one_two(octave: float) -> None:
    def passes(start: float) -> int:
        search, count = RateSearch(4.0, start), 0
        while not search.done:
            quality = search.next_quality()
            search.record(quality, 3.85 * 2 ** ((START_QUALITY - quality) / octave))
            count += 1
        return count

    assert passes(START_QUALITY) == 1
    assert passes(START_QUALITY - 1.0) <= 2
    assert passes(START_QUALITY + 1.0) <= 2


def test_the_search_ends_even_if_rates_rise_with_the_rate_factor() -> None:
    search = RateSearch(4.0)
    rng = np.random.default_rng(0)
    kept, count = 0.0, 0
    while not search.done and count < 100:
        rate = float(rng.uniform(1.0, 8.0))
        kept = rate if search.record(search.next_quality(), rate) else kept
        count += 1
    assert count < 30
    assert 0 < kept <= 4.0
