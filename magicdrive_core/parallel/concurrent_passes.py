"""Passes of the network at the same time on one CPU, each with its share of the threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class ConcurrentPasses:
    """Makes ``count`` calls at a time, each in a Python thread with its share of torch's threads.

    Two passes on half of the threads each take less time than one after the other on all of them: one computes while
    the other waits for its slowest thread, moves memory or is in Python. Their results are bit for bit those of passes
    one after the other on as many threads each: matrix products of torch may depend on the number of threads.

    Args:
        count: divides ``torch.get_num_threads()``.
    """

    def __init__(self, count: int) -> None:
        share = torch.get_num_threads() // count
        self._threads = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,))

    def __call__(self, *calls: Callable[[], Result]) -> list[Result]:
        """Makes the calls, at most ``count`` at a time, under the caller's gradient mode.

        Args:
            *calls: functions without arguments.

        Returns:
            Their results, in the order of ``calls``.
        """
        with_gradients = torch.is_grad_enabled()

        def run(call: Callable[[], Result]) -> Result:
            with torch.set_grad_enabled(with_gradients):
                return call()

        return list(self._threads.map(run, calls))


def one_after_another(*calls: Callable[[], Result]) -> list[Result]:
    """Makes calls in turn; has the interface of ``ConcurrentPasses``.

    Args:
        *calls: functions without arguments.

    Returns:
        Their results, in the order of ``calls``.
    """
    return [call() for call in calls]
