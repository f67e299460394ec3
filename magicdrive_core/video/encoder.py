"""Writing mp4: H.264 whose bit rate stays under a cap, and files joined without decoding.

The average bit rate of the *written file* is at most the cap. An encoder's rate option cannot promise that: white noise
at 4 Mbit/s comes out at 7 and more. Its constant quality can, because the file shrinks steadily as the quality falls.
So whole passes of constant quality search the best file under the cap (``rate_search``), each by what the files before
it measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import log10
from pathlib import Path

import av
import cv2
import numpy as np
from av import VideoFrame
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.stream import Stream
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.utils.files import atomic_file
from magicdrive_core.video.colour import ColourConverter, Picture
from magicdrive_core.video.decoder import decode_video, mbit_per_second
from magicdrive_core.video.rate_search import START_QUALITY, RateSearch

# Chosen by PSNR for time at a given bit rate: no psychovisual optimisation, but a trellis. The adaptive quantiser is
# on a little, so that a file's size follows the quality smoothly and not in steps of a tenth.
PRESET = "veryfast"
TUNING = {"tune": "psnr", "trellis": "1", "aq-mode": "2", "aq-strength": "0.3"}
# With AVX-512, x264's macroblock tree gives small frames other bytes from process to process, by what lies in memory.
# With AVX2 and with SSE4 it gives the same bytes always (benchmarks/results/generation.md).
CPU_FACTS = Path("/proc/cpuinfo")
THREADS = 4  # x264's bytes depend on the number of threads, so that it is not the host's
PSNR_CEILING = 100.0  # dB, for frames that are decoded without any error
MEMORY_BYTES = 16 * 2**20  # of each form of the frames, 3 or 7 frames at 1600x900; more go to the disk


@dataclass(frozen=True)
class EncodedVideo:
    """A written file, as measured.

    Attributes:
        path: the file.
        frames: number of frames.
        bytes: size of the file.
        mbit_s: average bit rate of the file in Mbit/s: 8 bytes / duration.
        psnr: dB of the decoded RGB frames against the source.
        quality: x264's constant rate factor that the search ended with: a good start for videos of similar content.
    """

    path: Path
    frames: int
    bytes: int
    mbit_s: float
    psnr: float
    quality: float


def encode_video(
    frames: Iterable[Picture],
    path: Path | str,
    *,
    fps: int,
    max_mbit_s: float | None,
    start: float = START_QUALITY,
    preset: str = PRESET,
) -> EncodedVideo:
    """Encodes RGB frames to an mp4 file, atomically; the same frames and start give the same bytes.

    Args:
        frames: uint8 pictures (H, W, 3) of one even size; with a generator, the first pass runs while it yields.
        path: the mp4 file.
        fps: frames per second.
        max_mbit_s: cap on the file's average bit rate in Mbit/s; None leaves the choice to the encoder.
        start: ``quality`` of a video of similar content; saves passes.
        preset: x264's trade of time for size.

    Returns:
        The file as measured.

    Raises:
        UsageError: there are no frames, or frames of different or odd sizes.
        MagicDriveError: even the worst quality is over the cap, or the disk is full.
    """
    path = Path(path)
    with atomic_file(path) as partial, FrameSpool(partial.parent) as spool:
        options, quality = {"preset": preset, **TUNING, **_instructions()}, start
        if max_mbit_s is None:
            _write(spool.record(frames), partial, fps, options)
        else:
            quality = _write_under_cap(spool, frames, partial, fps, RateSearch(max_mbit_s, start), options)
        measured = _measure(partial, len(spool), fps)
        psnr = _psnr(spool.pictures(), decode_video(partial))
        return EncodedVideo(path, len(spool), partial.stat().st_size, measured, round(psnr, 3), quality)


def _write_under_cap(
    spool: FrameSpool,
    pictures: Iterable[Picture],
    partial: Path,
    fps: int,
    search: RateSearch,
    options: dict[str, str],
) -> float:
    """Writes passes of different quality until ``partial`` is the best one under the cap; returns its quality."""
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".tries-") as folder:
        trial = Path(folder, partial.name)
        while not search.done:
            if search.infeasible:
                raise MagicDriveError(
                    f"{len(spool)} frames of {spool.width}x{spool.height} cannot be encoded at {search.cap:g} Mbit/s",
                    "raise video.max_mbit_s, or set it to null to let the encoder choose",
                )
            quality = search.next_quality()
            frames = spool.frames() if len(spool) else spool.record(pictures)
            _write(frames, trial, fps, options | {"crf": f"{quality:.3f}"})
            if search.record(quality, _measure(trial, len(spool), fps)):
                trial.replace(partial)
    return search.best_quality


def _write(frames: Iterable[VideoFrame], path: Path, fps: int, options: dict[str, str]) -> None:
    """Writes one pass of x264 over ``frames`` to ``path``."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        context = stream.codec_context
        context.thread_count = THREADS
        context.pix_fmt = "yuv420p"
        context.color_range = ColorRange.MPEG
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        for index, frame in enumerate(frames):
            if index == 0:
                context.height, context.width = frame.height, frame.width
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _instructions() -> dict[str, str]:
    """Returns the option that keeps x264 from AVX-512; a processor that has it has AVX2 too."""
    facts = CPU_FACTS.read_text(encoding="utf-8", errors="replace") if CPU_FACTS.is_file() else ""
    return {"x264-params": "asm=avx2"} if "avx512" in facts else {}


def _measure(path: Path, frames: int, fps: int) -> float:
    return mbit_per_second(path.stat().st_size, frames, fps)


def _psnr(source: Iterable[Picture], decoded: Iterable[Picture]) -> float:
    """Returns the peak signal-to-noise ratio over all frames in dB: 10 log10(255^2 / mean squared error)."""
    squares, count = 0.0, 0
    for before, after in zip(source, decoded, strict=True):
        squares += cv2.norm(before, after, cv2.NORM_L2SQR)
        count += before.size
    if not squares:
        return PSNR_CEILING
    return min(PSNR_CEILING, 10 * log10(255.0**2 * count / squares))


class FrameSpool:
    """Keeps the frames of one video until its file is right, in memory or, if there are many, in temporary files.

    It keeps them both as RGB and as the encoder takes them, so that they are converted once for all passes.

    Args:
        folder: where the temporary files are.

    Attributes:
        height: rows of every frame; 0 before the first frame.
        width: columns of every frame; 0 before the first frame.
    """

    def __init__(self, folder: Path) -> None:
        self._pictures, self._converted = (
            tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - closed in __exit__
            for _ in range(2)
        )
        self._count = 0
        self.height = self.width = 0

    def __enter__(self) -> FrameSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()
        self._converted.close()

    def __len__(self) -> int:
        return self._count

    def record(self, pictures: Iterable[Picture]) -> Iterator[VideoFrame]:
        """Yields RGB pictures as frames for the encoder while keeping both.

        Args:
            pictures: uint8 RGB pictures (H, W, 3) of one even size.

        Yields:
            yuv420p frames (see ``ColourConverter.to_yuv``), one for each picture.

        Raises:
            UsageError: there are no pictures, or pictures of different or odd sizes.
        """
        colours = ColourConverter()
        for picture in pictures:
            self._check(picture)
            frame = colours.to_yuv(picture)
            self._pictures.write(np.ascontiguousarray(picture).data)
            self._converted.write(np.ascontiguousarray(frame.to_ndarray()).data)
            self._count += 1
            yield frame
        if not self._count:
            raise UsageError("a video needs at least one frame")

    def frames(self) -> Iterator[VideoFrame]:
        """Yields the kept frames for the encoder again, from the first one.

        Yields:
            yuv420p frames of ``height`` x ``width``, the same as ``record`` yielded.
        """
        for data in _pieces(self._converted, self._count, self.height * self.width * 3 // 2):
            yield VideoFrame.from_ndarray(data.reshape(-1, self.width), format="yuv420p")

    def pictures(self) -> Iterator[Picture]:
        """Yields the kept pictures again, from the first one.

        Yields:
            uint8 RGB pictures (H, W, 3).
        """
        for data in _pieces(self._pictures, self._count, self.height * self.width * 3):
            yield data.reshape(self.height, self.width, 3)

    def _check(self, picture: Picture) -> None:
        if not self._count:
            self.height, self.width = picture.shape[:2]
            if self.height % 2 or self.width % 2:
                raise UsageError(f"frames of {self.width}x{self.height}: H.264 needs an even width and height")
        shape = (self.height, self.width, 3)
        if picture.shape != shape or picture.dtype != np.uint8:
            raise UsageError(
                f"frame {self._count} is {picture.dtype} {picture.shape}, but the video's frames are uint8 {shape}"
            )


def _pieces(file: tempfile.SpooledTemporaryFile[bytes], count: int, size: int) -> Iterator[Picture]:
    """Yields ``count`` pieces of ``size`` bytes from the start of a file."""
    file.seek(0)
    for _ in range(count):
        yield np.frombuffer(file.read(size), dtype=np.uint8)


def join_videos(parts: Sequence[Path], path: Path) -> None:
    """Joins mp4 files without decoding them: every part decodes to the same bits as before.

    Encoders of different quality write different parameter sets. Those of each part are stored inside the stream,
    before its first frame, where every decoder looks for them.

    Args:
        parts: mp4 files in H.264 of one size and frame rate, each starting with a key frame.
        path: the file to write, atomically.

    Raises:
        MagicDriveError: a part cannot be read as a video.
    """
    with atomic_file(path) as partial:
        try:
            _join(parts, partial)
        except av.FFmpegError as error:
            raise MagicDriveError(f"{', '.join(map(str, parts))} cannot be joined: {error.strerror}") from error


def _join(parts: Sequence[Path], partial: Path) -> None:
    delays = [_reorder_delay(part) for part in parts]
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as sink:
        target, begin = None, Fraction(0)
        for part, delay in zip(parts, delays, strict=True):
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                target = target or sink.add_stream_from_template(source)
                count = 0
                for packet in _with_parameters(source, container.demux(source)):
                    pts, dts = packet.pts or 0, packet.dts or 0
                    packet.pts = pts + int(begin / packet.time_base)
                    packet.dts = dts + int((begin + delay - max(delays)) / packet.time_base)  # never back in time
                    packet.stream = target
                    sink.mux(packet)
                    count += 1
                begin += count / Fraction(source.average_rate or 1)


def _reorder_delay(part: Path) -> Fraction:
    """Returns the seconds by which decoding must precede display, because frames are stored in another order."""
    with av.open(str(part)) as container:
        first = next(container.demux(container.streams.video[0]))
        return -(first.dts or 0) * first.time_base


def _with_parameters(source: Stream, packets: Iterator[Packet]) -> Iterator[Packet]:
    """Yields packets whose key frames carry the stream's parameter sets (Annex B)."""
    annex_b = BitStreamFilterContext("h264_mp4toannexb", source, None)
    for packet in packets:
        if packet.size:
            key, pts, dts, base = packet.is_keyframe, packet.pts, packet.dts, packet.time_base
            for made in annex_b.filter(packet):
                made.is_keyframe, made.time_base, made.pts, made.dts = key, base, pts, dts
                yield made
