"""The frames of one video, kept until its file is right: in memory, or in temporary files where they are many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from av import VideoFrame

from magicdrive_core.errors import UsageError
from magicdrive_core.video.colour import Colours, Picture

MEMORY_BYTES = 16 * 2**20  # of each form of the frames, three or seven at 1600x900; more go to the disk


class Spool:
    """Keeps frames as they came, and as the encoder takes them: they are converted once, whatever it tries.

    Attributes:
        height, width: of all frames, in pixels; 0 before the first.
    """

    def __init__(self, folder: Path) -> None:
        self._pictures, self._converted = (
            tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - closed in __exit__
            for _ in range(2)
        )
        self._count = 0
        self.height = self.width = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()
        self._converted.close()

    def __len__(self) -> int:
        return self._count

    def record(self, pictures: Iterable[Picture]) -> Iterator[VideoFrame]:
        """Yields RGB pictures (H, W, 3) as frames for the encoder while keeping both.

        Raises:
            UsageError: no pictures, pictures of different or odd sizes.
        """
        colours = Colours()
        for picture in pictures:
            self._check(picture)
            frame = colours.to_video(picture)
            self._pictures.write(np.ascontiguousarray(picture).data)
            self._converted.write(np.ascontiguousarray(frame.to_ndarray()).data)
            self._count += 1
            yield frame
        if not self._count:
            raise UsageError("a video needs at least one frame")

    def frames(self) -> Iterator[VideoFrame]:
        """Yields the kept frames for the encoder again."""
        for data in _pieces(self._converted, self._count, self.height * self.width * 3 // 2):
            yield VideoFrame.from_ndarray(data.reshape(-1, self.width), format="yuv420p")

    def pictures(self) -> Iterator[Picture]:
        """Yields the kept pictures (H, W, 3) again."""
        for data in _pieces(self._pictures, self._count, self.height * self.width * 3):
            yield data.reshape(self.height, self.width, 3)

    def _check(self, picture: Picture) -> None:
        if not self._count:
            self.height, self.width = picture.shape[:2]
            if self.height % 2 or self.width % 2:
                raise UsageError(f"a video of {self.width}x{self.height}: H.264 needs an even width and height")
        shape = (self.height, self.width, 3)
        if picture.shape != shape or picture.dtype != np.uint8:
            raise UsageError(f"frame {self._count} is {picture.dtype} {picture.shape}, the video uint8 {shape}")


def _pieces(file: tempfile.SpooledTemporaryFile[bytes], count: int, size: int) -> Iterator[Picture]:
    file.seek(0)
    for _ in range(count):
        yield np.frombuffer(file.read(size), dtype=np.uint8)
