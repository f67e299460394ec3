"""Prefetched micro-batches: in order, within the budget, with their errors, and copied to the device once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from magicdrive_core.training.loader import Batch, Prefetcher
from tests.model.networks import conditions

Jobs = Iterator[tuple[int, Callable[[], int]]]


def jobs(sizes: list[int], started: list[int], gate: threading.Semaphore | None = None) -> Jobs:
    def job(index: int) -> int:
        started.append(index)
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
def test_as_many_results_wait_as_fit_the_budget(budget: int, waiting: int) -> None:
    started: list[int] = []
    gate = threading.Semaphore(0)
    ahead = Prefetcher(jobs([10], started, gate), budget)
    for _ in range(waiting):
        assert gate.acquire(timeout=10)
    assert not gate.acquire(timeout=0.1)  # one more would be over the budget
    assert ahead.held == 10 * waiting
    ahead.next()
    assert gate.acquire(timeout=10)
    ahead.stop()


def test_an_error_is_raised_where_its_result_is_asked_for() -> None:
    def broken() -> int:
        raise ValueError("job 1")

    ahead = Prefetcher(iter([(1, lambda: 0), (1, broken)]), 5)
    assert ahead.next() == 0
    with pytest.raises(ValueError, match="job 1"):
        ahead.next()
    ahead.stop()


def test_the_end_of_the_jobs_is_raised() -> None:
    ahead = Prefetcher(iter([(1, lambda: 7)]), 100)
    assert ahead.next() == 7
    with pytest.raises(StopIteration):
        ahead.next()
    ahead.stop()


def test_stop_ends_a_thread_that_waits_for_memory() -> None:
    gate = threading.Semaphore(0)
    ahead = Prefetcher(jobs([10], [], gate), 10)
    assert gate.acquire(timeout=10)
    ahead.stop()
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_pinning_and_moving_keep_values_and_copy_the_boxes_of_all_views_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = conditions()
    corners = read.box_corners[:, :1].expand(-1, 6, -1, -1, -1, -1)
    batch = Batch(
        bucket=0,
        shape=(9, 48, 80),
        latents=torch.randn(1, 6, 4, 3, 6, 10),
        conditions=replace(read, box_corners=corners),
        mask=torch.tensor([[True, False, True]]),
        t=torch.tensor([400.0]),
        noise=torch.randn(1, 6, 4, 3, 6, 10),
        generator=torch.Generator(),
        flops=0.0,
    )
    copied: list[int] = []

    def copy(tensor: Tensor, *_: object, **__: object) -> Tensor:
        copied.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", copy)
    monkeypatch.setattr(Tensor, "to", copy)
    for after in (batch.pinned(), batch.to(torch.device("cpu"))):
        assert after.generator is batch.generator
        assert torch.equal(after.t, batch.t)
        assert torch.equal(after.noise, batch.noise)
        assert torch.equal(after.latents, batch.latents)
        assert after.mask is not None
        assert torch.equal(after.mask, torch.tensor([[True, False, True]]))
        for field in fields(read):
            expected = getattr(batch.conditions, field.name)
            if isinstance(expected, Tensor):
                assert torch.equal(getattr(after.conditions, field.name), expected)
                assert getattr(after.conditions, field.name).stride() == expected.stride()
    assert corners.numel() not in copied
    assert copied.count(corners.numel() // 6) == 2
