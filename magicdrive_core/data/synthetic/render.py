"""Draws the pictures that nuScenes tables name and the disk lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import cv2

from magicdrive_core.data.synthetic.light import light_of
from magicdrive_core.data.synthetic.maps import read_shapes
from magicdrive_core.data.synthetic.picture import Place, draw, encode, prepare_place
from magicdrive_core.data.synthetic.scenery import scenery_of
from magicdrive_core.data.synthetic.source import Footage, Shot, read_footage
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import sync_folder, write_unsynced
from magicdrive_core.progress import progress_bar

BATCH = 24  # pictures a task


def render_missing(root: Path, version: str, workers: int | None = None) -> int:
    """Draws every missing picture of a data root from its tables and its map expansion.

    Args:
        root: the data root; pictures are written below it.
        version: its table folder.
        workers: processes; the host's cores if None. They do not change a byte.

    Returns:
        How many pictures were drawn.

    Raises:
        MagicDriveError: tables or map are missing or damaged, the disk is full, a process was killed.
    """
    missing = [
        replace(scene, shots=[shot for shot in scene.shots if not (root / shot.filename).is_file()])
        for scene in read_footage(root, version)
    ]
    tasks = [replace(scene, shots=shots) for scene in missing for shots in _batches(scene.shots)]
    total = sum(len(task.shots) for task in tasks)
    folders = {(root / shot.filename).parent for task in tasks for shot in task.shots}
    for location in sorted({task.location for task in tasks}):
        read_shapes(root, location)  # a missing map is better reported here than by each process
    with progress_bar() as bar:
        progress = bar.add_task("drawing pictures", total=total)
        for drawn in _run(root, tasks, workers or len(os.sched_getaffinity(0))):
            bar.advance(progress, drawn)
    for folder in sorted(folders):
        sync_folder(folder)
    return total


def _batches(shots: list[Shot]) -> Iterator[list[Shot]]:
    for start in range(0, len(shots), BATCH):
        yield shots[start : start + BATCH]


def _run(root: Path, tasks: list[Footage], workers: int) -> Iterator[int]:
    """Draws the tasks and yields the number of pictures of each when it is done."""
    if min(workers, len(tasks)) <= 1:
        threads, ipp = cv2.getNumThreads(), cv2.ipp.useIPP()
        prepare_process()
        try:
            for task in tasks:
                yield _draw_task(root, task)
        finally:
            cv2.setNumThreads(threads)
            cv2.ipp.setUseIPP(ipp)
        return
    # Spawned, not forked: the caller may hold threads, and forked locks would hang.
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), prepare_process) as pool:
        futures = [pool.submit(_draw_task, root, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise MagicDriveError(
                "a process that draws pictures was killed", "free some memory and run again: finished pictures are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare_process() -> None:
    """Makes OpenCV single-threaded and keeps it from Intel's library, whose results depend on the processor."""
    cv2.setNumThreads(1)
    cv2.ipp.setUseIPP(False)


@cache
def _place(root: Path, location: str) -> Place:
    return prepare_place(read_shapes(root, location), scenery_of(root, location))


def _draw_task(root: Path, scene: Footage) -> int:
    place, light = _place(root, scene.location), light_of(scene.description)
    for shot in scene.shots:
        picture = draw(shot.lens, light, place, scene.things(shot.timestamp))
        write_unsynced(root / shot.filename, encode(picture))
    return len(scene.shots)
