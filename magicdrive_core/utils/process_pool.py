"""Run a function over many scenes: one after the other, or in one process a core if there are enough scenes."""

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

SCENES_A_WORKER = 8  # with fewer scenes, starting processes costs more than it saves
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_work: Callable[[Any], Any]  # the function of this worker process


def count_workers(scenes: int) -> int:
    """Return the number of processes that ``for_each_scene`` uses for a number of scenes.

    Args:
        scenes: number of scenes; a process is started for every ``SCENES_A_WORKER`` of them.

    Returns:
        At most the number of cores that this process may use; 1 if the work stays in this process.
    """
    return max(1, min(len(os.sched_getaffinity(0)), scenes // SCENES_A_WORKER))


def for_each_scene(
    work: Callable[[T], R], scenes: Sequence[T], description: str, start: Literal["spawn", "fork"] = "spawn"
) -> list[R]:
    """Call a function on every scene, under a progress bar.

    Args:
        work: the function. It must write its results completely or not at all, because it may be stopped at any moment.
        scenes: the argument of each call.
        description: text of the progress bar.
        start: how processes start. "spawn" pickles ``work`` to each of them. "fork" shares this process's memory, for
            functions that hold gigabytes of tables; no other thread may hold a lock then.

    Returns:
        The results, in the order of the scenes.

    Raises:
        MagicDriveError: a process was killed. Errors of ``work`` are raised unchanged. In both cases the other
            processes are stopped without waiting for them.
    """
    workers = count_workers(len(scenes))
    if workers == 1:
        with closing(track(scenes, description)) as tracked:  # closes the bar before an error is printed
            return [work(scene) for scene in tracked]
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context(start)
    gc.freeze()  # otherwise each collection in a forked process copies the tables that it only reads
    try:
        with ProcessPoolExecutor(workers, context, initializer=_initialise, initargs=(work,)) as pool:
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
            f"{description}: a worker process was killed", "the host may be out of memory: close other programs"
        ) from None
    finally:
        gc.unfreeze()


def end_with_parent() -> None:
    """Tie this worker process to its parent: end when the parent ends, and leave Ctrl-C to the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # otherwise it waits forever after the parent was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _initialise(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    end_with_parent()


def _run(scene: Any) -> Any:
    return _work(scene)
