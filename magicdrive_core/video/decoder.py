"""Reading mp4: frames as arrays, and measurements of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
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
    """Contents of a video file, counted and not taken from its header.

    Attributes:
        frames: number of frames.
        fps: frames per second.
        height: rows of a frame.
        width: columns of a frame.
        codec: ffmpeg's name of the codec, such as "h264".
        bytes: size of the file.
        mbit_s: average bit rate of the whole file in Mbit/s: 8 bytes / (frames / fps).
        even: whether each frame is shown 1 / fps after the one before it, to a tick of the file's clock.
    """

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    bytes: int
    mbit_s: float
    even: bool


# Opening a file would decode its first frame to find its format: 9 to 16 ms at W-CODA's cap, before any check of ours.
_UNDECODED = {"codec_whitelist": "none"}
MAX_PIXELS = 8192 * 4352  # of a frame; a file that claims more is refused before memory is allocated


def decode_video(
    source: Path | str | BinaryIO, *, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Picture]:
    """Yields the frames of a video in order of display, one at a time.

    Args:
        source: an mp4 file, by path or opened.
        size: (H, W) to scale the frames to; None: the file's own.
        max_pixels: most pixels of a frame that is decoded.

    Yields:
        RGB frames (H, W, 3).

    Raises:
        MagicDriveError: the file is missing, is not a video or is broken, or a frame has more than ``max_pixels``.
    """
    colours = ColourConverter()
    with _opened(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = _strict(max_pixels)
        for frame in container.decode(stream):
            yield colours.to_rgb(frame, size)


def scan_video(
    source: Path | str | BinaryIO, keep: Container[int], *, most: int, max_pixels: int = MAX_PIXELS
) -> tuple[int, dict[int, Picture]]:
    """Decodes every frame but converts only some to RGB, in a third of the time of ``decode_video``.

    Args:
        source: an mp4 file, by path or opened.
        keep: numbers of the frames that are converted.
        most: number of frames after which decoding ends.
        max_pixels: most pixels of a frame that is decoded.

    Returns:
        Number of decoded frames, and the converted frames (H, W, 3) by number.

    Raises:
        MagicDriveError: see ``decode_video``.
    """
    colours, kept, count = ColourConverter(), {}, 0
    for frame in _frames(source, max_pixels):
        if count in keep:
            kept[count] = colours.to_rgb(frame)
        count += 1
        if count == most:
            break
    return count, kept


def digest_frames(source: Path | str | BinaryIO, count: int, *, max_pixels: int = MAX_PIXELS) -> str:
    """Computes a digest of the decoded planes of the first frames of a video; it is equal only if all pixels are.

    Args:
        source: an mp4 file, by path or opened.
        count: number of frames; a shorter video is digested whole.
        max_pixels: most pixels of a frame that is decoded.

    Returns:
        SHA-256 in hex.

    Raises:
        MagicDriveError: see ``decode_video``.
    """
    digest = hashlib.sha256()
    for frame in islice(_frames(source, max_pixels), count):
        digest.update(frame.to_ndarray().tobytes())
    return digest.hexdigest()


def probe(source: Path | str | BinaryIO, *, first_frame: bool = False) -> VideoInfo:
    """Counts the frames of a video and measures its bit rate, without decoding it.

    Args:
        source: an mp4 file, by path or opened.
        first_frame: whether the first frame is decoded, to see that it can be.

    Returns:
        The measured contents; ``mbit_s`` is 0 for a file without frames or without a frame rate.

    Raises:
        MagicDriveError: the file is missing or is not a video, or its first frame is broken.
    """
    with _opened(source) as container:
        stream = container.streams.video[0]
        frames = 0
        stamps: list[int | None] = []
        for packet in container.demux(stream):
            if packet.size and not frames and first_frame:
                _decode_first(packet)
            if packet.size:
                frames += 1
                stamps.append(packet.pts)
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
            even=_even(stamps, stream.average_rate, stream.time_base),
        )


def _even(stamps: list[int | None], rate: Fraction | None, tick: Fraction | None) -> bool:
    """Tells whether time stamps, in ticks and in order of coding, are 1 / rate apart in order of display."""
    known = sorted(stamp for stamp in stamps if stamp is not None)
    if len(known) < len(stamps) or not rate or not tick:
        return False
    step = 1 / (rate * tick)
    return all(abs(stamp - known[0] - index * step) <= 1 for index, stamp in enumerate(known))


def _decode_first(packet: Packet) -> None:
    """Decodes the packet of a first frame, which refers to no other packet.

    Raises:
        EOFError: the packet holds no decodable frame.
    """
    context = packet.stream.codec_context
    context.thread_count = 1
    context.options = _strict(MAX_PIXELS)
    if not [*context.decode(packet), *context.decode(None)]:
        raise EOFError("the first frame cannot be decoded")


def _frames(source: Path | str | BinaryIO, max_pixels: int) -> Iterator[VideoFrame]:
    """Yields the decoder's own frames. One thread decodes, because callers decode many files at once."""
    with _opened(source) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _strict(max_pixels)
        yield from container.decode(stream)


def _strict(max_pixels: int) -> dict[str, str]:
    """Options of the decoder: without "explode" it would conceal broken data silently."""
    return {"err_detect": "explode", "max_pixels": str(max_pixels)}


def mbit_per_second(size: int, frames: int, fps: float) -> float:
    """Computes the average bit rate of a file, container included: 8 bytes x fps / frames.

    Args:
        size: size of the file in bytes.
        frames: number of frames, at least 1.
        fps: frames per second.

    Returns:
        The bit rate in Mbit/s (10^6 bits per second).
    """
    return size * 8 * fps / frames / 1e6


@contextmanager
def _opened(source: Path | str | BinaryIO) -> Iterator[InputContainer]:
    name = str(source) if isinstance(source, (Path, str)) else "the video"
    try:
        with av.open(str(source) if isinstance(source, Path) else source, "r", options=_UNDECODED) as container:
            if not container.streams.video:
                raise MagicDriveError(f"{name} has no video stream")
            yield container
    except (av.FFmpegError, EOFError) as error:
        raise MagicDriveError(f"{name} cannot be read as a video: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
