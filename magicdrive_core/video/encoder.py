"""H.264 in mp4 under a limit that holds: the average bit rate of the *written file* is at most the cap.

An encoder's rate option is a wish (white noise at 4 Mbit/s comes out at 7 and more). So the first pass encodes at a
quality that the eye cannot tell from the source and takes notes of every frame's needs. Only if the file that it
leaves is over the cap, passes with a rate target spread the bits by those notes, and each next target is corrected by
what the last file measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import log10
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.files import atomic_file
from magicdrive_core.video.colour import Colours, Picture
from magicdrive_core.video.decoder import decode_video, mbit_per_second

CLEAR_QUALITY = 12  # x264's constant rate factor; about 49 dB on street views
CAP_TRIES = 8  # passes with a rate target
CLOSE_ENOUGH = 0.96  # of the cap: nearer is not worth another pass
AIM = 0.985  # of the cap: what a corrected target aims at
THREADS = 4  # x264's bytes depend on their number, so it is not the host's
SPOOL_BYTES = 128 * 2**20  # source frames kept in memory for the next pass; more of them go to a temporary file
PSNR_CEILING = 100.0  # dB, for frames that came back identical


@dataclass(frozen=True)
class EncodedVideo:
    """A written file, as measured on it."""

    path: Path
    frames: int
    bytes: int
    mbit_s: float  # bytes * 8 / duration
    psnr: float  # dB of the decoded RGB frames against the source


def encode_video(
    frames: Iterable[Picture], path: Path | str, *, fps: int, max_mbit_s: float | None, preset: str = "fast"
) -> EncodedVideo:
    """Encodes RGB frames (H, W, 3) to ``path``, atomically; the same frames give the same bytes.

    ``frames`` may be a generator: the first pass runs while it yields.

    Args:
        frames: uint8 pictures of one even size.
        path: the mp4 file.
        fps: frames per second.
        max_mbit_s: cap of the file's average bit rate; None leaves the choice to the encoder.
        preset: x264's trade of time for size.

    Raises:
        UsageError: no frames, frames of different or odd sizes.
        MagicDriveError: even the worst quality is over the cap, or the disk is full.
    """
    path = Path(path)
    with atomic_file(path) as partial, tempfile.TemporaryDirectory(prefix="x264-") as notes_folder:
        notes = str(Path(notes_folder, "notes"))
        with _Spool(partial.parent) as spool:
            if max_mbit_s is None:
                _write(spool.record(frames), partial, fps, {"preset": preset})
            else:
                first = {"preset": preset, "crf": str(CLEAR_QUALITY), "passlogfile": notes}
                _write(spool.record(frames), partial, fps, first, flags=Flags.pass1)
                if _measure(partial, len(spool), fps) > max_mbit_s:
                    _write_under_cap(spool, partial, fps, max_mbit_s, {"preset": preset, "passlogfile": notes})
            psnr = _psnr(spool.replay(), decode_video(partial))
            return EncodedVideo(
                path, len(spool), partial.stat().st_size, _measure(partial, len(spool), fps), round(psnr, 3)
            )


def _write_under_cap(spool: _Spool, partial: Path, fps: int, cap: float, options: dict[str, str]) -> None:
    """Writes the best file under ``cap`` Mbit/s that corrected rate targets find.

    After a try over the cap, and after one far below it, the target moves by the measured ratio.
    """
    target, best = AIM * cap, 0.0
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".tries-") as folder:
        trial = Path(folder, partial.name)
        for _ in range(CAP_TRIES):
            try:
                _write(spool.replay(), trial, fps, options, flags=Flags.pass2, bit_rate=max(1000, int(target * 1e6)))
            except av.ExternalError:  # x264 knows from its notes that no quality is as low as that
                break
            measured = _measure(trial, len(spool), fps)
            if best < measured <= cap:
                trial.replace(partial)
                best = measured
            if CLOSE_ENOUGH * cap <= best:
                return
            target *= AIM * cap / measured
    if not best:
        raise MagicDriveError(
            f"{len(spool)} frames of {spool.width}x{spool.height} cannot be encoded at {cap:g} Mbit/s",
            "raise video.max_mbit_s, or null lets the encoder decide",
        )


def _write(
    frames: Iterable[Picture],
    path: Path,
    fps: int,
    options: dict[str, str],
    *,
    flags: int = 0,
    bit_rate: int | None = None,
) -> None:
    """One pass of x264 over ``frames`` into ``path``."""
    colours = Colours()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        context = stream.codec_context
        context.thread_count = THREADS
        context.pix_fmt = "yuv420p"
        context.color_range = ColorRange.MPEG
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.flags |= flags
        if bit_rate is not None:
            context.bit_rate = bit_rate
        for index, picture in enumerate(frames):
            if index == 0:
                context.height, context.width = picture.shape[:2]
            frame = colours.to_video(picture)
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class _Spool:
    """The source frames of one video, kept for later passes: in memory, from ``SPOOL_BYTES`` on in a file."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, dir=str(folder))  # noqa: SIM115 - closed in __exit__
        self._count = 0
        self.height = self.width = 0

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def record(self, frames: Iterable[Picture]) -> Iterator[Picture]:
        """Yields ``frames`` while keeping them."""
        for picture in frames:
            if not self._count:
                self.height, self.width = picture.shape[:2]
                if self.height % 2 or self.width % 2:
                    raise UsageError(f"a video of {self.width}x{self.height}: H.264 needs an even width and height")
            if picture.shape != (self.height, self.width, 3) or picture.dtype != np.uint8:
                raise UsageError(
                    f"frame {self._count} is {picture.dtype} {picture.shape}, the video uint8 "
                    f"{(self.height, self.width, 3)}"
                )
            self._file.write(np.ascontiguousarray(picture).data)
            self._count += 1
            yield picture
        if not self._count:
            raise UsageError("a video needs at least one frame")

    def replay(self) -> Iterator[Picture]:
        """Yields the kept frames again."""
        self._file.seek(0)
        size = self.height * self.width * 3
        for _ in range(self._count):
            yield np.frombuffer(self._file.read(size), dtype=np.uint8).reshape(self.height, self.width, 3)


def _measure(path: Path, frames: int, fps: int) -> float:
    return mbit_per_second(path.stat().st_size, frames, fps)


def _psnr(source: Iterable[Picture], decoded: Iterable[Picture]) -> float:
    """Peak signal-to-noise ratio over all frames in dB: 10 log10(255^2 / mean squared error)."""
    squares, count = 0.0, 0
    for before, after in zip(source, decoded, strict=True):
        error = np.subtract(before, after, dtype=np.float32).ravel()
        squares += float(np.dot(error, error))
        count += error.size
    if not squares:
        return PSNR_CEILING
    return min(PSNR_CEILING, 10 * log10(255.0**2 * count / squares))
