"""From generated frames to an item's folder: a queue to the encoder's thread, then video files, sheet and record.

Encoding runs in a thread, so that the next item is sampled meanwhile. Frames that wait for it are in temporary files at
the network's size, not in memory. This module imports no torch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from queue import Queue
from typing import BinaryIO

import numpy as np
from PIL import Image

from magicdrive_core.config.schema import Config, parse_size
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.checked import note_checked, stamps
from magicdrive_core.inference.items import Item, item_seed
from magicdrive_core.utils.files import atomic_folder, sha256_file
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.frames import full_size_image, write_frames
from magicdrive_core.video.item_record import ItemRecord, ViewFile, video_name
from magicdrive_core.video.rate_search import START_QUALITY
from magicdrive_core.video.sheets import contact_sheet, six_views

QUEUED_VIEWS = len(VIEWS)  # views that wait for the encoder before the decoder waits for it
SHEET = "sheet.png"
SHEET_VIEW = 400  # pixels: widest view in the contact sheet

InitialImages = Callable[[int], Iterator[Picture]]
"""Yields the initial images (900, 1600, 3) of a view, by its index in ``VIEWS``."""


class FrameFile:
    """Frames of one view in a temporary file without a name, which vanishes with its process whatever ends it.

    The file is in the folder for temporary files (``TMPDIR``).

    Args:
        frames: uint8 frames (H, W, 3) of one size; all are written at once.
    """

    def __init__(self, frames: Iterable[Picture]) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - read and closed by another thread
        self._shape: tuple[int, ...] = ()
        self._count = 0
        for frame in frames:
            self._shape = frame.shape
            self._file.write(np.ascontiguousarray(frame).data)
            self._count += 1

    def read(self) -> Iterator[Picture]:
        """Yields the frames once, then frees the disk.

        Yields:
            uint8 frames (H, W, 3) in the order in which they were written; they are read-only.
        """
        with self._file as file:
            file.seek(0)
            for _ in range(self._count):
                yield np.frombuffer(file.read(int(np.prod(self._shape))), dtype=np.uint8).reshape(self._shape)

    def close(self) -> None:
        """Frees the disk, whether the frames were read or not."""
        self._file.close()


class _AbandonedError(Exception):
    """The decoder failed in the middle of an item."""


class FrameQueue:
    """Queue of views from the decoder to the encoder's thread; items are written in the order in which they started.

    Leaving the context waits until everything is written.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._views: Queue[FrameFile | BaseException | None] = Queue(QUEUED_VIEWS)

    def __enter__(self) -> FrameQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def write(self, views: Iterable[FrameFile], write: Callable[[Iterator[FrameFile]], None]) -> Future[None]:
        """Passes the views of an item to ``write`` on the encoder's thread; returns when all of them are queued.

        Args:
            views: the views, decoded while this iterates.
            write: takes the views of one item and writes its folder.

        Returns:
            A future that ends with ``write``.

        Raises:
            Exception: what ``views`` raised, after ``write`` has ended too.
        """
        future = self._thread.submit(self._run, write)
        try:
            for view in views:
                self._views.put(view)
        except BaseException as error:
            self._views.put(error)
            future.exception()
            raise
        self._views.put(None)
        return future

    def _run(self, write: Callable[[Iterator[FrameFile]], None]) -> None:
        views = self._views_of_item()
        try:
            write(views)
        finally:
            with suppress(_AbandonedError):
                for view in views:  # left over if writing failed: the views of the next item come after them
                    view.close()

    def _views_of_item(self) -> Iterator[FrameFile]:
        while (view := self._views.get()) is not None:
            if isinstance(view, BaseException):
                raise _AbandonedError from view
            yield view


@dataclass(frozen=True)
class ItemWriter:
    """Writes the folder of one item: a file for each view, a contact sheet and ``item.json``.

    Attributes:
        config: settings; sections ``video`` and ``generate`` are read.
        item: the item.
        scene: its scene.
        caption: text that it was conditioned on.
        fingerprint: changes with everything that decides its pixels.
        lineage: digests of its inputs, by name.
        initial_images: the initial frames, written before the generated ones; None: all frames are generated.
        times: ``time.perf_counter()`` when sampling started and when decoding started.
        is_claimed: tells whether this worker still holds the claim on the item.
    """

    config: Config
    item: Item
    scene: Scene
    caption: str
    fingerprint: str
    lineage: dict[str, str]
    initial_images: InitialImages | None
    times: tuple[float, float]
    is_claimed: Callable[[], bool]

    def write(self, folder: Path, views: Iterable[FrameFile]) -> None:
        """Writes the item's folder, which appears when it is complete.

        Args:
            folder: folder of the item.
            views: generated frames of each view, in the order of ``VIEWS``.

        Raises:
            MagicDriveError: a view cannot be encoded, the disk is full, or another worker took over the item.
        """
        with atomic_folder(folder) as partial:
            thumbnails: list[list[Picture]] = []
            files: dict[str, ViewFile] = {}
            quality = START_QUALITY  # the views are alike: each search starts where the one before ended
            for v, frames in enumerate(views):
                thumbnails.append([])
                files[VIEWS[v]], quality = self._write_view(v, frames.read(), partial, thumbnails[-1], quality)
            self._write_sheet(partial / SHEET, thumbnails)
            self._record(files).write(partial)
            if not self.is_claimed():
                raise MagicDriveError(
                    f"{self.item.name} was taken over by another worker",
                    "this worker was suspended for too long; run again to finish the others",
                )
            found = stamps(partial)
        note_checked(folder, self.fingerprint, found)

    def _write_view(
        self, v: int, frames: Iterator[Picture], folder: Path, thumbnails: list[Picture], quality: float
    ) -> tuple[ViewFile, float]:
        """Writes one view's file.

        Args:
            v: index of the view in ``VIEWS``.
            frames: its generated frames (H, W, 3).
            folder: where the file is written.
            thumbnails: small frames for the sheet are appended to it.
            quality: rate factor to start the search with.

        Returns:
            The file as measured, and the rate factor that the search ended with.
        """
        video, kept = self.config.video, self.item.kept
        initial = self.initial_images(v) if self.initial_images else iter(())
        width = min(SHEET_VIEW, parse_size(self.config.generate.resolution)[1])
        every = islice(chain(initial, map(full_size_image, frames)), kept)
        images = _with_thumbnails(every, _sheet_frames(kept), width, thumbnails)
        path = folder / video_name(self.scene.first_sample, VIEWS[v])
        if kept == 1:
            path = path.with_suffix(".png")
            Image.fromarray(next(images)).save(path)
            return ViewFile.of_images(path), quality
        if video.format == "png":
            path = path.with_suffix("")
            write_frames(images, path)
            return ViewFile.of_images(path), quality
        made = encode_video(images, path, fps=video.fps, max_mbit_s=video.max_mbit_s, start=quality)
        return ViewFile(path.name, sha256_file(path), made.bytes, made.mbit_s, made.psnr), made.quality

    def _write_sheet(self, path: Path, thumbnails: Sequence[Sequence[Picture]]) -> None:
        """Writes an image of all views at the first, a middle and the last frame."""
        grids = [six_views(np.stack(frames)) for frames in zip(*thumbnails, strict=True)]
        labels = [f"frame {frame}" for frame in _sheet_frames(self.item.kept)]
        title = f"{self.scene.name}, generation {self.item.generation}"
        Image.fromarray(contact_sheet([grids], (), labels, title, self.caption)).save(path)

    def _record(self, files: dict[str, ViewFile]) -> ItemRecord:
        began, sampled = self.times
        return ItemRecord(
            fingerprint=self.fingerprint,
            sample=self.scene.first_sample,
            scene=self.scene.token,
            scene_name=self.scene.name,
            start=self.item.clip.start,
            generated=self.item.clip.frames,
            frames=self.item.kept,
            fps=self.config.video.fps,
            generation=self.item.generation,
            caption=self.caption,
            seed=item_seed(self.config, self.item),
            size=self.config.generate.resolution,
            lineage=self.lineage,
            seconds={
                "sample": round(sampled - began, 2),
                "decode_and_encode": round(time.perf_counter() - sampled, 2),
            },
            views=files,
        )


def _sheet_frames(frames: int) -> list[int]:
    """Numbers of the frames in the sheet: the first, a middle and the last one."""
    return sorted({0, frames // 2, frames - 1})


def _with_thumbnails(
    frames: Iterable[Picture], wanted: Sequence[int], width: int, thumbnails: list[Picture]
) -> Iterator[Picture]:
    """Yields ``frames`` and appends those with the numbers ``wanted``, resized to a width, to ``thumbnails``."""
    for number, frame in enumerate(frames):
        if number in wanted:
            height = round(width * frame.shape[0] / frame.shape[1])
            small = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
            thumbnails.append(np.asarray(small))
        yield frame
