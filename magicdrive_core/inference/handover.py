"""Views on their way to the encoder, which has a thread of its own: the next item is sampled meanwhile.

What waits lies in temporary files (``TMPDIR``) of the network's own size, not in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Queue
from typing import BinaryIO

import numpy as np

from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.video.colour import Picture

AHEAD = len(VIEWS)  # views that wait for the encoder before the decoder waits for it


class FrameFile:
    """Frames (H, W, 3) of one view in a temporary file without a name: gone with its owner, whatever ends it."""

    def __init__(self, frames: Iterable[Picture]) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - read by another thread, closed there
        self._shape: tuple[int, ...] = ()
        self._count = 0
        for frame in frames:
            self._shape = frame.shape
            self._file.write(np.ascontiguousarray(frame).data)
            self._count += 1

    def read(self) -> Iterator[Picture]:
        """Yields the frames once, then frees the disk."""
        with self._file as file:
            file.seek(0)
            for _ in range(self._count):
                yield np.frombuffer(file.read(int(np.prod(self._shape))), dtype=np.uint8).reshape(self._shape)

    def close(self) -> None:
        """Frees the disk, read or not."""
        self._file.close()


class _AbandonedError(Exception):
    """The decoder failed in the middle of an item."""


class Handover:
    """The encoder's thread. Items are written one after the other, in the order in which they begin."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._views: Queue[FrameFile | BaseException | None] = Queue(AHEAD)

    def __enter__(self) -> Handover:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def write(self, views: Iterable[FrameFile], write: Callable[[Iterator[FrameFile]], None]) -> Future[None]:
        """Hands the views of an item to ``write`` on the encoder's thread, as fast as it takes them.

        Returns:
            What ends with ``write``.

        Raises:
            Exception: ``views`` failed; ``write`` was ended too.
        """
        future = self._thread.submit(self._drained, write)
        try:
            for view in views:
                self._views.put(view)
        except BaseException as error:
            self._views.put(error)
            future.exception()
            raise
        self._views.put(None)
        return future

    def _drained(self, write: Callable[[Iterator[FrameFile]], None]) -> None:
        views = self._item()
        try:
            write(views)
        finally:
            with suppress(_AbandonedError):
                for view in views:  # of an item that failed: the next one's come after them
                    view.close()

    def _item(self) -> Iterator[FrameFile]:
        while (view := self._views.get()) is not None:
            if isinstance(view, BaseException):
                raise _AbandonedError from view
            yield view
