"""Folders of PNG frames, the lossless form of a video."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.video.colour import Picture
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


def full_size_image(frame: Picture) -> Picture:
    """A frame (H, W, 3) as a picture (900, 1600, 3): resized to the full width, black rows on top.

    The rows are those that were cut off before training: 52 at 424x800 and 848x1600, 4 at 224x400.

    Raises:
        MagicDriveError: the frame is taller than the picture.
    """
    height = round(frame.shape[0] * PICTURE_WIDTH / frame.shape[1])
    if height > PICTURE_HEIGHT:
        raise MagicDriveError(
            f"frames of {frame.shape[0]}x{frame.shape[1]} are taller than {PICTURE_HEIGHT} rows at full width",
            "choose a generate.resolution of 16:9 or wider",
        )
    out = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH, 3), dtype=np.uint8)
    resized = Image.fromarray(frame).resize((PICTURE_WIDTH, height), Image.Resampling.BICUBIC)
    out[PICTURE_HEIGHT - height :] = np.asarray(resized)
    return out
