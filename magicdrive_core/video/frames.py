"""Frames of one view: folders of PNG files, the lossless form of a video, and full-size images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, Framing
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.decoder import decode_video

LEVEL = 3  # of PNG compression: half the time of the default for a quarter more bytes


def write_frames(frames: Iterable[Picture], folder: Path) -> None:
    """Writes RGB frames as PNG files ``000000.png``, ``000001.png`` and so on.

    Args:
        frames: uint8 RGB frames (H, W, 3).
        folder: the folder to create; it must not exist.

    Raises:
        FileExistsError: the folder exists.
    """
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number:06d}.png", compress_level=LEVEL)


def frame_files(folder: Path) -> list[Path]:
    """Lists the PNG files of a folder in the order of the numbers in their names (2 before 10).

    Args:
        folder: a folder of PNG frames; other files in it are ignored.

    Returns:
        The paths, at least one.

    Raises:
        MagicDriveError: the folder is missing, or holds no PNG file.
    """
    if not folder.is_dir():
        raise MagicDriveError(f"{folder} is not a folder", "name a folder of PNG frames")
    files = sorted((path for path in folder.iterdir() if path.suffix.lower() == ".png"), key=_order)
    if not files:
        raise MagicDriveError(f"{folder} holds no PNG frames")
    return files


def read_frame(path: Path) -> Picture:
    """Reads a PNG file as an RGB frame.

    Args:
        path: a PNG file with 8 bits a channel; grey and palette images are converted, and an alpha channel is dropped.

    Returns:
        uint8 RGB frame (H, W, 3).

    Raises:
        MagicDriveError: the file is not a readable image with 8 bits a channel.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode not in ("RGB", "RGBA", "L", "P"):
                raise MagicDriveError(f"{path} is an image of mode {picture.mode}", "use 8 bits a channel")
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # PIL raises SyntaxError for broken PNG chunks
        raise MagicDriveError(f"{path} cannot be read as a PNG image: {error}") from None


def read_view(path: Path, size: tuple[int, int] | None = None) -> Iterator[Picture]:
    """Yields the frames of one view.

    Args:
        path: a video file, or a folder of PNG frames.
        size: (H, W) to scale the frames to; None: their own.

    Yields:
        RGB frames (H, W, 3).

    Raises:
        MagicDriveError: the path is neither, or a file is broken.
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
    """Sorting key of a file name: digits compare as numbers, the rest as text."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def full_size_image(frame: Picture) -> Picture:
    """Turns a frame of the network into an image as W-CODA and nuScenes have them.

    It is resized to the full width; the rows that were cropped before training come back black, on top: 52 rows at
    424x800 and 848x1600, 4 at 224x400.

    Args:
        frame: RGB frame (H, W, 3).

    Returns:
        RGB image (900, 1600, 3).

    Raises:
        MagicDriveError: the frame is taller than the image.
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


def crop_to_frame(image: Picture, framing: Framing) -> Picture:
    """Turns a full-size image into a frame of the network: the inverse of ``full_size_image``, apart from resampling.

    Args:
        image: RGB image (900, 1600, 3).
        framing: size of the frame (H, W), from which the cropped rows follow.

    Returns:
        RGB frame (H, W, 3): the image resized to width W, without its top ``framing.crop`` rows.
    """
    resized = Image.fromarray(image).resize((framing.width, framing.resized_height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[framing.crop :]
