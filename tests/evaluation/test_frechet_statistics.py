"""Streaming statistics are numpy's, in any order; the Fréchet distance is that of the closed forms and of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from magicdrive_core.evaluation.frechet import Statistics, frechet_distance


def of_moments(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(2, np.asarray(mean, float), np.asarray(covariance, float))  # scatter / (2 - 1)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2),
    width=st.integers(1, 5),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    order=st.randoms(use_true_random=False),
)
def test_pieces_in_any_order_are_the_whole(
    seed: int, sizes: list[int], width: int, offset: float, order: object
) -> None:
    features = np.random.default_rng(seed).normal(offset, 3.0, (sum(sizes), width))
    pieces = np.split(features, np.cumsum(sizes)[:-1])
    order.shuffle(pieces)
    merged = Statistics.empty(width)
    for piece in pieces:
        merged = merged.merge(Statistics.of(piece))
    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-12)
    expected = np.cov(features, rowvar=False).reshape(width, width)
    np.testing.assert_allclose(merged.covariance, expected, rtol=1e-7, atol=1e-7 * max(1.0, np.abs(expected).max()))


def test_a_common_shift_of_the_features_does_not_eat_the_covariance() -> None:
    features = np.random.default_rng(0).normal(1e8, 1.0, (500, 3))
    whole = Statistics.empty(3)
    for piece in np.array_split(features, 50):
        whole = whole.merge(Statistics.of(piece))
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 12))
def test_it_is_what_scipy_computes(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (
        rng.normal(size=(3 * width + 20, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
        for _ in "ab"
    )
    ours = frechet_distance(Statistics.of(a), Statistics.of(b))
    c_a, c_b = (np.cov(x, rowvar=False).reshape(width, width) for x in (a, b))
    shift = a.mean(axis=0) - b.mean(axis=0)
    theirs = shift @ shift + np.trace(c_a + c_b - 2 * np.real(sqrtm(c_a @ c_b)))
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6 * np.trace(c_a + c_b))


def test_closed_forms() -> None:
    rng = np.random.default_rng(3)
    mean, spread = rng.normal(size=4), rng.uniform(0.1, 5, (2, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    a = of_moments(mean, turn @ np.diag(spread[0] ** 2) @ turn.T)
    b = of_moments(mean + 2, turn @ np.diag(spread[1] ** 2) @ turn.T)
    # Covariances that commute: |m_a - m_b|^2 + sum (s_a - s_b)^2.
    assert frechet_distance(a, b) == pytest.approx(16 + ((spread[0] - spread[1]) ** 2).sum(), rel=1e-10)
    assert frechet_distance(of_moments([1.0], [[4.0]]), of_moments([4.0], [[9.0]])) == pytest.approx(9 + 1)


def test_fewer_features_than_their_width_are_no_trouble() -> None:
    rng = np.random.default_rng(5)
    few, more = rng.normal(size=(5, 64)), rng.normal(size=(9, 64))
    assert frechet_distance(Statistics.of(few), Statistics.of(few)) == pytest.approx(0, abs=1e-9)
    there, back = (frechet_distance(*map(Statistics.of, pair)) for pair in ((few, more), (more, few)))
    assert there == pytest.approx(back)
    assert there > 0
    one = Statistics.of(few[:1])
    assert frechet_distance(one, one) == 0


def test_nothing_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="both sides"):
        frechet_distance(Statistics.empty(2), Statistics.of(np.ones((3, 2))))
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        frechet_distance(Statistics.of(np.ones((3, 2))), Statistics.of(np.ones((3, 3))))
