"""Calls made at the same time on one CPU, each with its share of the threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class ConcurrentPasses:
    """Makes ``calls`` calls at a time, each in a Python thread of its own.

    Two passes on half of the threads each take less time than one after the other on all of them: one computes while
    the other waits for its slowest thread, moves memory or is in Python. The result is the same, bit for bit.

    Args:
        calls: that divide ``torch.get_num_threads()``.
    """

    def __init__(self, calls: int) -> None:
        share = torch.get_num_threads() // calls
        self._threads = ThreadPoolExecutor(calls, initializer=torch.set_num_threads, initargs=(share,))

    def __call__(self, *calls: Callable[[], Tensor]) -> list[Tensor]:
        """The results of ``calls``, under the caller's gradient mode."""
        with_gradients = torch.is_grad_enabled()

        def run(call: Callable[[], Tensor]) -> Tensor:
            with torch.set_grad_enabled(with_gradients):
                return call()

        return list(self._threads.map(run, calls))


def in_turn(*calls: Callable[[], Tensor]) -> list[Tensor]:
    """The results of ``calls``, made one after the other."""
    return [call() for call in calls]
