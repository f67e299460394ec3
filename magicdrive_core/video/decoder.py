"""Reading mp4: frames as arrays, and what a file measures."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import av
from av import Packet, VideoFrame
from av.container import InputContainer

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.video.colour import ColourConverter, Picture


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, counted and not taken from its header."""

    frames: int
    fps: float
    height: int  # pixels
    width: int
    codec: str  # ffmpeg's name: "h264"
    bytes: int
    mbit_s: float  # of the whole file: bytes * 8 / (frames / fps)


# Opening a file would decode its first frame to see what it is: 9 to 16 ms at W-CODA's cap, before any of our checks.
_UNDECODED = {"codec_whitelist": "none"}
MAX_PIXELS = 8192 * 4352  # of a frame: no memory is given to a file that claims more


def decode_video(
    source: Path | str | BinaryIO, *, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Picture]:
    """Yields the frames (H, W, 3) of a video in order of display, one at a time; scaled to ``size`` (H, W) if given.

    Raises:
        MagicDriveError: the file is missing, is no video, its data is broken, or a frame has more than ``max_pixels``.
    """
    colours = ColourConverter()
    with _opened(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = _strict(max_pixels)
        for frame in container.decode(stream):
            yield colours.to_picture(frame, size)


def scan_video(
    source: Path | str | BinaryIO, keep: Container[int], *, most: int, max_pixels: int = MAX_PIXELS
) -> tuple[int, dict[int, Picture]]:
    """Decodes every frame up to ``most``, but turns only those numbered in ``keep`` into pictures: a third of the time.

    Returns:
        how many frames were decoded, and the kept pictures (H, W, 3) by number.

    Raises:
        MagicDriveError: as ``decode_video``.
    """
    colours, kept, count = ColourConverter(), {}, 0
    for frame in _frames(source, max_pixels):
        if count in keep:
            kept[count] = colours.to_picture(frame)
        count += 1
        if count == most:
            break
    return count, kept


def digest_frames(source: Path | str | BinaryIO, count: int, *, max_pixels: int = MAX_PIXELS) -> str:
    """Hex SHA-256 over the decoded planes of the first ``count`` frames: equal where, and only where, pixels are.

    Raises:
        MagicDriveError: as ``decode_video``.
    """
    digest = hashlib.sha256()
    for frame in islice(_frames(source, max_pixels), count):
        digest.update(frame.to_ndarray().tobytes())
    return digest.hexdigest()


def probe(source: Path | str | BinaryIO, *, first_frame: bool = False) -> VideoInfo:
    """Counts the frames of a video and measures its bit rate, without decoding more than the first one, if asked to.

    Raises:
        MagicDriveError: the file is missing or is no video, or its first frame is broken.
    """
    with _opened(source) as container:
        stream = container.streams.video[0]
        frames = 0
        for packet in container.demux(stream):
            if packet.size and not frames and first_frame:
                _decode_alone(packet)
            frames += packet.size > 0
        fps = float(stream.average_rate or 0)
        size = container.size
        return VideoInfo(
            frames=frames,
            fps=fps,
            height=stream.height,
            width=stream.width,
            codec=stream.codec.name,
            bytes=size,
            mbit_s=mbit_per_second(size, frames, fps) if frames and fps else 0.0,
        )


def _decode_alone(packet: Packet) -> None:
    """Decodes a packet that needs no others."""
    context = packet.stream.codec_context
    context.thread_count = 1
    context.options = _strict(MAX_PIXELS)
    if not [*context.decode(packet), *context.decode(None)]:
        raise EOFError("its first frame cannot be decoded")


def _frames(source: Path | str | BinaryIO, max_pixels: int) -> Iterator[VideoFrame]:
    """The decoder's own frames, on one thread: many files are decoded at once where this is used."""
    with _opened(source) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _strict(max_pixels)
        yield from container.decode(stream)


def _strict(max_pixels: int) -> dict[str, str]:
    """Without "explode" the decoder paints over broken data and says nothing."""
    return {"err_detect": "explode", "max_pixels": str(max_pixels)}


def mbit_per_second(size: int, frames: int, fps: float) -> float:
    """Average bit rate of a file of ``size`` bytes, container included, in Mbit/s."""
    return size * 8 * fps / frames / 1e6


@contextmanager
def _opened(source: Path | str | BinaryIO) -> Iterator[InputContainer]:
    name = str(source) if isinstance(source, (Path, str)) else "the video"
    try:
        with av.open(str(source) if isinstance(source, Path) else source, "r", options=_UNDECODED) as container:
            if not container.streams.video:
                raise MagicDriveError(f"{name} holds no video stream")
            yield container
    except (av.FFmpegError, EOFError) as error:
        raise MagicDriveError(f"{name} cannot be read as a video: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
