"""Folders of PNG frames, the lossless form of a video."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from av import VideoFrame
from PIL import Image, UnidentifiedImageError

from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.video.colour import Colours, Picture
from magicdrive_core.video.decoder import decode_video

LEVEL = 3  # of PNG's compression: half of the default's time for a quarter more bytes


def write_frames(frames: Iterable[Picture], folder: Path) -> None:
    """Writes RGB frames (H, W, 3) as ``000000.png`` and so on; ``folder`` is made."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number:06d}.png", compress_level=LEVEL)


def frame_files(folder: Path) -> list[Path]:
    """The PNG files of a folder, in the order of the numbers in their names (2 before 10).

    Raises:
        MagicDriveError: there is no such folder, or no PNG file in it.
    """
    if not folder.is_dir():
        raise MagicDriveError(f"{folder} is no folder", "name a folder of PNG frames")
    files = sorted((path for path in folder.iterdir() if path.suffix.lower() == ".png"), key=_order)
    if not files:
        raise MagicDriveError(f"{folder} holds no PNG frames")
    return files


def read_frame(path: Path) -> Picture:
    """A PNG file as an RGB frame (H, W, 3); grey and palette pictures are converted.

    Raises:
        MagicDriveError: it is no readable picture of 8 bits a channel.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode not in ("RGB", "RGBA", "L", "P"):
                raise MagicDriveError(f"{path} is a picture of mode {picture.mode}", "frames have 8 bits a channel")
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # SyntaxError is PIL's word for broken PNG chunks
        raise MagicDriveError(f"{path} cannot be read as a PNG picture: {error}") from None


def read_view(path: Path, size: tuple[int, int] | None = None) -> Iterator[Picture]:
    """Yields the frames (H, W, 3) of a video file or of a folder of frames; scaled to ``size`` (H, W) if given.

    Raises:
        MagicDriveError: it is neither, or broken.
    """
    if not path.is_dir():
        yield from decode_video(path, size=size)
        return
    for file in frame_files(path):
        frame = read_frame(file)
        if size is not None:
            frame = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
        yield frame


def _order(path: Path) -> list[tuple[int, str]]:
    """Digits compare as numbers, the rest as text."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


# The frames of one video, kept until its file is right: in memory, or in temporary files where they are many.

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
