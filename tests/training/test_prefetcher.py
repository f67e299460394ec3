"""Work done ahead: in order, within the budget, and with its errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.training.loader import Prefetcher

Jobs = Iterator[tuple[int, Callable[[], int]]]


def jobs(sizes: list[int], began: list[int], gate: threading.Semaphore | None = None) -> Jobs:
    def job(index: int) -> int:
        began.append(index)
        if gate:
            gate.release()
        return index

    for index in range(10**6):
        yield sizes[index % len(sizes)], lambda index=index: job(index)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 20))
def test_results_come_in_order_within_the_budget(sizes: list[int], budget: int) -> None:
    ahead = Prefetcher(jobs(sizes, []), budget)
    for index in range(12):
        assert ahead.held <= max(budget, max(sizes))
        assert ahead.next() == index
    ahead.stop()


@pytest.mark.parametrize(("budget", "waiting"), [(0, 1), (10, 1), (20, 2), (55, 5)])
def test_as_many_wait_as_fit(budget: int, waiting: int) -> None:
    began: list[int] = []
    gate = threading.Semaphore(0)
    ahead = Prefetcher(jobs([10], began, gate), budget)
    for _ in range(waiting):
        assert gate.acquire(timeout=10)
    assert not gate.acquire(timeout=0.1)  # one more would be over the budget
    assert ahead.held == 10 * waiting
    ahead.next()
    assert gate.acquire(timeout=10)
    ahead.stop()


def test_an_error_is_raised_in_its_turn() -> None:
    def broken() -> int:
        raise ValueError("job 1")

    ahead = Prefetcher(iter([(1, lambda: 0), (1, broken)]), 5)
    assert ahead.next() == 0
    with pytest.raises(ValueError, match="job 1"):
        ahead.next()
    ahead.stop()


def test_jobs_end_and_say_so() -> None:
    ahead = Prefetcher(iter([(1, lambda: 7)]), 100)
    assert ahead.next() == 7
    with pytest.raises(StopIteration):
        ahead.next()
    ahead.stop()


def test_stop_ends_a_thread_that_waits_for_room() -> None:
    gate = threading.Semaphore(0)
    ahead = Prefetcher(jobs([10], [], gate), 10)
    assert gate.acquire(timeout=10)
    ahead.stop()
    assert not any(thread.name == "loader" for thread in threading.enumerate())
