"""From the network's frames back to pictures of 1600x900, as W-CODA and nuScenes have them."""

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
from magicdrive_core.inference.items import Item, item_seed
from magicdrive_core.utils.files import atomic_folder, sha256_file
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.frames import full_size_image, write_frames
from magicdrive_core.video.item_record import ItemRecord, ViewFile, video_name
from magicdrive_core.video.rate_search import START
from magicdrive_core.video.sheets import contact_sheet, six_views

# Views on their way to the encoder, which has a thread of its own: the next item is sampled meanwhile.
#
# What waits lies in temporary files (``TMPDIR``) of the network's own size, not in memory.

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


class FrameQueue:
    """The encoder's thread. Items are written one after the other, in the order in which they begin."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._views: Queue[FrameFile | BaseException | None] = Queue(AHEAD)

    def __enter__(self) -> FrameQueue:
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


# From the frames of an item to its folder: six files, a contact sheet, the record. No torch.

SHEET = "sheet.png"
SHEET_VIEW = 400  # pixels: the widest view in the contact sheet

Given = Callable[[int], Iterator[Picture]]
"""The pictures (900, 1600, 3) that a view begins with, by its number."""


@dataclass(frozen=True)
class ItemWriter:
    """Writes one item."""

    config: Config
    item: Item
    scene: Scene
    caption: str
    fingerprint: str
    lineage: dict[str, str]
    given: Given | None
    times: tuple[float, float]  # of time.perf_counter: when sampling began, and decoding
    holds: Callable[[], bool]  # whether the item is still this worker's

    def write(self, folder: Path, views: Iterable[FrameFile]) -> None:
        """Puts the item's folder in place when all of it is there.

        Args:
            folder: of the item.
            views: the generated frames of each, as they come.

        Raises:
            MagicDriveError: a view cannot be encoded, the disk is full, or another worker took the item over.
        """
        with atomic_folder(folder) as partial:
            shown: list[list[Picture]] = []
            files: dict[str, ViewFile] = {}
            quality = START  # of like views: each begins where the one before ended
            for v, frames in enumerate(views):
                shown.append([])
                files[VIEWS[v]], quality = self._write_view(v, frames.read(), partial, shown[-1], quality)
            self._write_sheet(partial / SHEET, shown)
            self._record(files).write(partial)
            if not self.holds():
                raise MagicDriveError(
                    f"{self.item.name} was taken over by another worker", "this one was stopped too long"
                )

    def _write_view(
        self, v: int, frames: Iterator[Picture], folder: Path, shown: list[Picture], quality: float
    ) -> tuple[ViewFile, float]:
        """One view's file, and the quality that its encoder came out at; notes frames for the sheet in ``shown``."""
        video, kept = self.config.video, self.item.kept
        given = self.given(v) if self.given else iter(())
        width = min(SHEET_VIEW, parse_size(self.config.generate.resolution)[1])
        pictures = _noted(islice(chain(given, map(full_size_image, frames)), kept), _moments(kept), width, shown)
        path = folder / video_name(self.scene.first_sample, VIEWS[v])
        if kept == 1:
            path = path.with_suffix(".png")
            Image.fromarray(next(pictures)).save(path)
            return ViewFile.of_pictures(path), quality
        if video.format == "png":
            path = path.with_suffix("")
            write_frames(pictures, path)
            return ViewFile.of_pictures(path), quality
        made = encode_video(pictures, path, fps=video.fps, max_mbit_s=video.max_mbit_s, start=quality)
        return ViewFile(path.name, sha256_file(path), made.bytes, made.mbit_s, made.psnr), made.quality

    def _write_sheet(self, path: Path, shown: Sequence[Sequence[Picture]]) -> None:
        """A picture of all views at the first, a middle and the last frame."""
        grids = [six_views(np.stack(frames)) for frames in zip(*shown, strict=True)]
        labels = [f"frame {moment}" for moment in _moments(self.item.kept)]
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


def _moments(frames: int) -> list[int]:
    """The first, a middle and the last frame."""
    return sorted({0, frames // 2, frames - 1})


def _noted(frames: Iterable[Picture], wanted: Sequence[int], width: int, notes: list[Picture]) -> Iterator[Picture]:
    """Passes ``frames`` on and keeps those of the numbers ``wanted``, resized to a width."""
    for number, frame in enumerate(frames):
        if number in wanted:
            height = round(width * frame.shape[0] / frame.shape[1])
            small = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
            notes.append(np.asarray(small))
        yield frame
