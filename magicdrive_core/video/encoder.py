"""The search for the best quality whose file is under a cap, by what the files made so far measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import log2, log10
from pathlib import Path

import av
import cv2
from av import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_file
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.decoder import decode_video, mbit_per_second
from magicdrive_core.video.frames import Spool

# x264's constant rate factor: lower is better. At 12 (47 dB on street views) nobody sees a difference to the source.
BEST, START, WORST = 12.0, 16.0, 51.0
OCTAVE = 5.5  # of rate factor: what halves the rate of common content
CLOSE_ENOUGH = 0.92  # of the cap: nearer is not worth another pass
AIM = 0.96  # of the cap: the middle of what is close enough
FINEST = 0.05  # of rate factor: no search between two that are closer
MARGIN = 0.1  # of the way between two qualities that the next one keeps from either


@dataclass
class _Side:
    """The quality nearest to the cap on one side of it."""

    quality: float  # constant rate factor
    octaves: float  # of its rate above the aim (below: negative); halved while the other side alone gets nearer


class RateSearch:
    """One search, told of every try: false position through the logarithms of rates, the Illinois way.

    Rates fall as the rate factor rises, nearly: a try that breaks the rule costs passes, never the cap.

    Args:
        cap: Mbit/s.
        start: the first quality to try; the better the guess, the fewer the passes.

    Attributes:
        done: whether no further pass is worth its time.
        hopeless: whether even the worst quality is over the cap.
        best_quality: of the largest file under the cap.
    """

    def __init__(self, cap: float, start: float = START) -> None:
        self.done = self.hopeless = False
        self.best_quality = start
        self.cap, self._start = cap, start
        self._best = 0.0  # Mbit/s
        self._over: _Side | None = None
        self._under: _Side | None = None
        self._last_was_over = False

    def tell(self, quality: float, mbit_s: float) -> bool:
        """Takes note of a try of ``next_quality``; whether its file is the best under the cap so far."""
        made, is_over = _Side(quality, log2(mbit_s / (AIM * self.cap))), mbit_s > self.cap
        stale = self._under if is_over else self._over
        if stale and is_over == self._last_was_over:
            stale.octaves /= 2
        self._last_was_over = is_over
        if is_over:
            self._over = made
            self.hopeless = quality >= WORST
            return False
        self._under = made
        self.done = (
            mbit_s >= CLOSE_ENOUGH * self.cap
            or quality <= BEST
            or (self._over is not None and quality - self._over.quality <= FINEST)
        )
        if mbit_s <= self._best:
            return False
        self._best, self.best_quality = mbit_s, quality
        return True

    def next_quality(self) -> float:
        """The rate factor to try next."""
        over, under = self._over, self._under
        if over and under:
            share = over.octaves / (over.octaves - under.octaves) if under.octaves < over.octaves else 0.5
            return over.quality + min(1 - MARGIN, max(MARGIN, share)) * (under.quality - over.quality)
        if over:
            return min(WORST, over.quality + max(0.3, OCTAVE * over.octaves))
        if under:
            return max(BEST, under.quality + min(-0.3, OCTAVE * under.octaves))
        return self._start


# H.264 in mp4 under a limit that holds: the average bit rate of the *written file* is at most the cap.
#
# An encoder's rate option is a wish (white noise at 4 Mbit/s comes out at 7 and more), its constant quality is not:
# the file shrinks steadily as the quality falls. So whole passes of constant quality search the best file under the
# cap, each by what the files before it measured.

# Chosen by decibels for time at a given rate (docs/log.md): no psychovisual tricks, but a trellis. The adaptive
# quantiser is on a little, so that a file's size follows the quality smoothly and not in steps of a tenth.
PRESET = "veryfast"
TUNING = {"tune": "psnr", "trellis": "1", "aq-mode": "2", "aq-strength": "0.3"}
THREADS = 4  # x264's bytes depend on their number, so it is not the host's
PSNR_CEILING = 100.0  # dB, for frames that came back identical


@dataclass(frozen=True)
class EncodedVideo:
    """A written file, as measured on it."""

    path: Path
    frames: int
    bytes: int
    mbit_s: float  # bytes * 8 / duration
    psnr: float  # dB of the decoded RGB frames against the source
    quality: float  # x264's constant rate factor that the cap led to: a start for videos of like content


def encode_video(
    frames: Iterable[Picture],
    path: Path | str,
    *,
    fps: int,
    max_mbit_s: float | None,
    start: float = START,
    preset: str = PRESET,
) -> EncodedVideo:
    """Encodes RGB frames (H, W, 3) to ``path``, atomically; the same frames and start give the same bytes.

    ``frames`` may be a generator: the first pass runs while it yields.

    Args:
        frames: uint8 pictures of one even size.
        path: the mp4 file.
        fps: frames per second.
        max_mbit_s: cap of the file's average bit rate; None leaves the choice to the encoder.
        start: the ``quality`` that a video of like content came out at; saves passes.
        preset: x264's trade of time for size.

    Raises:
        UsageError: no frames, frames of different or odd sizes.
        MagicDriveError: even the worst quality is over the cap, or the disk is full.
    """
    path = Path(path)
    with atomic_file(path) as partial, Spool(partial.parent) as spool:
        options, quality = {"preset": preset, **TUNING}, start
        if max_mbit_s is None:
            _write(spool.record(frames), partial, fps, options)
        else:
            quality = _write_under_cap(spool, frames, partial, fps, RateSearch(max_mbit_s, start), options)
        measured = _measure(partial, len(spool), fps)
        psnr = _psnr(spool.pictures(), decode_video(partial))
        return EncodedVideo(path, len(spool), partial.stat().st_size, measured, round(psnr, 3), quality)


def _write_under_cap(
    spool: Spool, pictures: Iterable[Picture], partial: Path, fps: int, search: RateSearch, options: dict[str, str]
) -> float:
    """Writes passes of different quality until ``partial`` is the best one under the cap; returns its quality."""
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".tries-") as folder:
        trial = Path(folder, partial.name)
        while not search.done:
            if search.hopeless:
                raise MagicDriveError(
                    f"{len(spool)} frames of {spool.width}x{spool.height} cannot be encoded at {search.cap:g} Mbit/s",
                    "raise video.max_mbit_s, or null lets the encoder decide",
                )
            quality = search.next_quality()
            frames = spool.frames() if len(spool) else spool.record(pictures)
            _write(frames, trial, fps, options | {"crf": f"{quality:.3f}"})
            if search.tell(quality, _measure(trial, len(spool), fps)):
                trial.replace(partial)
    return search.best_quality


def _write(frames: Iterable[VideoFrame], path: Path, fps: int, options: dict[str, str]) -> None:
    """One pass of x264 over ``frames`` into ``path``."""
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


def _measure(path: Path, frames: int, fps: int) -> float:
    return mbit_per_second(path.stat().st_size, frames, fps)


def _psnr(source: Iterable[Picture], decoded: Iterable[Picture]) -> float:
    """Peak signal-to-noise ratio over all frames in dB: 10 log10(255^2 / mean squared error)."""
    squares, count = 0.0, 0
    for before, after in zip(source, decoded, strict=True):
        squares += cv2.norm(before, after, cv2.NORM_L2SQR)
        count += before.size
    if not squares:
        return PSNR_CEILING
    return min(PSNR_CEILING, 10 * log10(255.0**2 * count / squares))
