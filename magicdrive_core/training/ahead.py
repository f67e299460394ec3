"""Work that is done ahead by a thread, in order, as far as a number of bytes allows."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Results of jobs in their order; the next ones are made while the last one is used.

    One job is always done ahead, however large; more as long as all that waits stays within the budget.

    Args:
        jobs: (bytes of the result, the job).
        budget: bytes of results that may wait.
    """

    def __init__(self, jobs: Iterator[tuple[int, Callable[[], T]]], budget: int) -> None:
        self._jobs, self._budget = jobs, budget
        self._done: deque[tuple[int, T | BaseException]] = deque()
        self._held = 0
        self._stopped = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Bytes of the results that wait, and of the one that is being made."""
        with self._change:
            return self._held

    def next(self) -> T:
        """The next result; raises what its job raised, and StopIteration after the last one."""
        with self._change:
            self._change.wait_for(lambda: self._done)
            size, result = self._done.popleft()
            self._held -= size
            self._change.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        """Ends the thread after the job that it is at; what waits is dropped."""
        with self._change:
            self._stopped = True
            self._done.clear()
            self._change.notify_all()
        self._thread.join()

    def _may_begin(self, size: int) -> bool:
        return self._stopped or not self._held or self._held + size <= self._budget

    def _work(self) -> None:
        for size, job in self._jobs:
            with self._change:
                self._change.wait_for(partial(self._may_begin, size))
                if self._stopped:
                    return
                self._held += size
            result: T | BaseException
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
                result = error
            with self._change:
                self._done.append((size, result))
                self._change.notify_all()
            if isinstance(result, BaseException):
                return
        with self._change:
            self._done.append((0, StopIteration()))
            self._change.notify_all()
