"""The frame queue to the encoder's thread: in order, while the next item is sampled, with few frames in memory."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.writer import FrameFile, FrameQueue
from magicdrive_core.video.colour import Picture

SECONDS = 60.0


def view(shade: int, count: int = 2) -> FrameFile:
    return FrameFile(np.full((4, 6, 3), shade + n, dtype=np.uint8) for n in range(count))


def shades(views: Iterator[FrameFile]) -> list[int]:
    return [int(frame[0, 0, 0]) for frames in views for frame in frames.read()]


def test_the_next_item_is_queued_while_one_is_encoded() -> None:
    written: list[list[int]] = []
    encoding, sampled = threading.Event(), threading.Event()

    def encode(views: Iterator[FrameFile]) -> None:
        first_view = next(views)
        encoding.set()
        assert sampled.wait(SECONDS)
        written.append(shades(chain([first_view], views)))

    with FrameQueue() as frame_queue:
        first = frame_queue.write((view(10 * n) for n in range(6)), encode)
        assert encoding.wait(SECONDS)
        assert not first.done()  # yet all six views are queued, in files
        sampled.set()
        second = frame_queue.write((view(100 + 10 * n) for n in range(6)), lambda views: written.append(shades(views)))
        first.result(SECONDS)
        second.result(SECONDS)
    assert written == [
        [10 * n + f for n in range(6) for f in range(2)],
        [100 + 10 * n + f for n in range(6) for f in range(2)],
    ]


def test_an_item_that_cannot_be_encoded_does_not_harm_the_next_one() -> None:
    def broken(views: Iterator[FrameFile]) -> None:
        next(views).close()
        raise MagicDriveError("no space left on the disk")

    written: list[list[int]] = []
    with FrameQueue() as frame_queue:
        first = frame_queue.write([view(0), view(1), view(2)], broken)
        second = frame_queue.write([view(7)], lambda views: written.append(shades(views)))
        with pytest.raises(MagicDriveError, match="no space left"):
            first.result(SECONDS)
        second.result(SECONDS)
    assert written == [[7, 8]]


def test_an_item_whose_decoding_fails_is_not_written() -> None:
    finished = threading.Event()

    def views() -> Iterator[FrameFile]:
        yield view(0)
        raise MagicDriveError("a latent is not finite")

    def encode(views: Iterator[FrameFile]) -> None:
        shades(views)
        finished.set()

    with FrameQueue() as frame_queue, pytest.raises(MagicDriveError, match="not finite"):
        frame_queue.write(views(), encode)
    assert not finished.is_set()


def test_few_frames_are_in_memory_at_a_time() -> None:
    frame_bytes = 300 * 400 * 3

    def frames() -> Iterator[Picture]:
        for n in range(40):
            yield np.full((300, 400, 3), n, dtype=np.uint8)

    tracemalloc.start()
    try:
        for n, frame in enumerate(FrameFile(frames()).read()):
            assert frame[0, 0, 0] == n
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frame_bytes < peak < 4 * frame_bytes
