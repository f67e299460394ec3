"""Cost of encoding a view, by part, and its quality at the cap. Times are in multiples of a plain x264 pass.

    python benchmarks/video.py
    python benchmarks/video.py --pictures data/sweeps/CAM_FRONT

Sixteen frames of 1600x900 at 12 Hz, cap 4 Mbit/s, of several contents: smooth (noise of 28x50 pixels that drifts,
enlarged twice, as generated at 112x200), grain (the same with film grain), noise (white), and pictures of a folder.
Each is encoded twice: as the first view of an item, and as a later one, which starts at the quality where the one
before ended. The unit is one pass of x264's preset "fast" at rate factor 16 on the same frames, timed in the same run.
Times are CPU times of all threads of this process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from magicdrive_core.video import encoder
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.encoder import FrameSpool
from magicdrive_core.video.frames import full_size_image
from magicdrive_core.video.rate_search import START_QUALITY

FRAMES, FPS, CAP = 16, 12, 4.0
PARTS = ("convert", "passes", "measure")


class Clock:
    """CPU seconds and number of calls, by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.count = dict.fromkeys(PARTS, 0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the CPU time of the context to a part."""
        began = time.process_time()
        yield
        self.seconds[name] += time.process_time() - began
        self.count[name] += 1


def smooth() -> Iterator[Picture]:
    """Yields blotches that move by one pixel of 112x200 from frame to frame."""
    blotches = np.random.default_rng(0).integers(0, 256, (28, 66, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(blotches).resize((264, 112), Image.Resampling.BICUBIC))
    for n in range(FRAMES):
        yield full_size_image(np.ascontiguousarray(wide[:, 2 * n : 2 * n + 200]))


def grain() -> Iterator[Picture]:
    """Yields the same with grain that changes from frame to frame."""
    rng = np.random.default_rng(1)
    for picture in smooth():
        yield np.clip(picture + rng.integers(-12, 13, (900, 1600, 1)), 0, 255).astype(np.uint8)


def noise() -> Iterator[Picture]:
    """Yields white noise."""
    rng = np.random.default_rng(2)
    return (rng.integers(0, 256, (900, 1600, 3), dtype=np.uint8) for _ in range(FRAMES))


def measured(frames: list[Picture], path: Path, start: float) -> tuple[encoder.EncodedVideo, Clock]:
    """Encodes frames and measures each part."""
    clock, write, psnr, record = Clock(), encoder._write, encoder._psnr, FrameSpool.record

    def timed_record(spool: FrameSpool, pictures: Iterator[Picture]) -> list[object]:
        with clock.part("convert"):
            return list(record(spool, pictures))

    def timed_write(*args: object) -> None:
        with clock.part("passes"):
            write(*args)  # type: ignore[arg-type]

    def timed_psnr(*args: object) -> float:
        with clock.part("measure"):
            return psnr(*args)  # type: ignore[arg-type]

    with (
        patch.object(encoder, "_write", timed_write),
        patch.object(encoder, "_psnr", timed_psnr),
        patch.object(FrameSpool, "record", timed_record),
    ):
        return encoder.encode_video(iter(frames), path, fps=FPS, max_mbit_s=CAP, start=start), clock


def unit_pass(frames: list[Picture], path: Path) -> float:
    """Returns the CPU seconds of the plain pass."""
    with FrameSpool(path.parent) as spool:
        converted = list(spool.record(iter(frames)))
        began = time.process_time()
        encoder._write(converted, path, FPS, {"preset": "fast", "crf": "16"})
        return time.process_time() - began


def main() -> None:
    """Measures all contents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder with 16 pictures or more of one size, in order of name")
    folder = parser.parse_args().pictures
    contents = {"smooth": smooth, "grain": grain, "noise": noise}
    if folder:
        contents["pictures"] = lambda: (np.asarray(Image.open(path)) for path in sorted(folder.iterdir())[:FRAMES])
    table = Table("content", "view", "CPU s", "in passes", *PARTS, "of x264", "Mbit/s", "dB")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "a.mp4")
        for name, make in contents.items():
            frames, start = list(make()), START_QUALITY
            unit = unit_pass(frames, path)
            for view in ("first", "later"):
                made, clock = measured(frames, path, start)
                start = made.quality
                total = sum(clock.seconds.values())
                shares = [f"{clock.seconds[part] / unit:.2f}" for part in PARTS]
                table.add_row(
                    *(name, view, f"{total:.2f}", f"{total / unit:.2f}", *shares, str(clock.count["passes"])),
                    *(f"{made.mbit_s:.2f}", f"{made.psnr:.2f}"),
                )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
