"""Work on many scenes: one after the other, or in a process on each core where there are enough of them."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any, Literal, TypeVar

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.progress import track

T = TypeVar("T")
R = TypeVar("R")

SCENES_A_WORKER = 8  # fewer are done faster than processes start
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def count_workers(scenes: int) -> int:
    """How many processes ``for_each_scene`` shares so many scenes out among."""
    return max(1, min(len(os.sched_getaffinity(0)), scenes // SCENES_A_WORKER))


def for_each_scene(
    work: Callable[[T], R], scenes: Sequence[T], description: str, start: Literal["spawn", "fork"] = "spawn"
) -> list[R]:
    """``work`` of every scene, in their order, under a progress bar.

    Args:
        work: leaves its result whole or not at all, so that it can be stopped at any moment.
        scenes: what it is called with.
        description: of the bar.
        start: of the processes. "spawn" hands ``work`` to each of them. "fork" lets them see this one's memory: for
            work that holds gigabytes of tables. No other thread may hold a lock then.

    Raises:
        MagicDriveError: a process was killed; or what ``work`` raises. The others are stopped, not waited for.
    """
    workers = count_workers(len(scenes))
    if workers == 1:
        with closing(track(scenes, description)) as rest:  # or an error would be told before the bar ends
            return [work(scene) for scene in rest]
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context(start)
    gc.freeze()  # or each collection in a forked process would copy the tables that it only reads
    try:
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,)) as pool:
            futures = [pool.submit(_run, scene) for scene in scenes]
            try:
                with closing(track(as_completed(futures), description, len(futures))) as done:
                    for future in done:
                        future.result()
            except BaseException:
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
            return [future.result() for future in futures]
    except BrokenProcessPool:
        raise MagicDriveError(
            f"{description}: a process was killed", "most likely the memory is full: close other programs"
        ) from None
    finally:
        gc.unfreeze()


_work: Callable[[Any], Any]  # of this process


def end_with_parent() -> None:
    """For a process of a pool: it never outlives the one that started it, and leaves Ctrl-C to that one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # else it would wait for ever where the parent is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    end_with_parent()


def _run(scene: Any) -> Any:
    return _work(scene)
