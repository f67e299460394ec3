"""What packing and checking a whole W-CODA submission costs: 150 scenes x 4 generations x 6 views.

    python benchmarks/package.py
    python benchmarks/package.py --scenes 5

No network: items of a stand-in sampler. A dozen distinct videos (blotches that drift under grain, 16 frames of 1600x900
at 12 Hz) are encoded at the rate asked for and hard-linked under the names of all items, so that the encoder is not
what is measured; packing copies, hashes and zips every file, and the validator decodes every one of them. CPU time of
all threads of this process; everything is written into a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from magicdrive_core.config.load import load_config
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.encoder import EncodedVideo, encode_video
from magicdrive_core.video.item_record import ItemRecord, ViewFile, video_name
from magicdrive_core.wcoda.package import pack
from magicdrive_core.wcoda.submission import Expected
from magicdrive_core.wcoda.validator import validate

DISTINCT, FRAMES, FPS, GENERATIONS = 12, 16, 12, 4
GRAIN = 24  # of 256
PROFILE = Path(__file__).resolve().parents[1] / "profiles/demo.yaml"


def drift(seed: int) -> Iterator[Picture]:
    """Blotches that move by a hundredth of the picture a frame; as much grain as makes any rate be used."""
    rng = np.random.default_rng(seed)
    blotches = Image.fromarray(rng.integers(0, 256, (9, 24, 3), dtype=np.uint8))
    wide = np.asarray(blotches.resize((PICTURE_WIDTH + 16 * FRAMES, PICTURE_HEIGHT), Image.Resampling.BICUBIC))
    for n in range(FRAMES):
        grain = rng.integers(0, GRAIN, (PICTURE_HEIGHT, PICTURE_WIDTH, 1), dtype=np.uint8)
        yield wide[:, 16 * n : 16 * n + PICTURE_WIDTH] // 2 + grain


def write_items(out: Path, videos: list[EncodedVideo], scenes: int) -> None:
    """Items as generation leaves them, their files hard links."""
    digests = [sha256_file(video.path) for video in videos]
    for scene in range(scenes):
        sample = hashlib.md5(str(scene).encode()).hexdigest()
        for generation in range(GENERATIONS):
            views = {}
            record = ItemRecord(
                fingerprint=f"{scene:032x}{generation:032x}",
                sample=sample,
                scene=sample[::-1],
                scene_name=f"scene-{scene:04d}",
                start=0,
                generated=17,
                frames=FRAMES,
                fps=FPS,
                generation=generation,
                caption="A driving scene image at nowhere. A stand-in.",
                seed=0,
                size="848x1600",
                lineage={},
                seconds={},
                views=views,
            )
            folder = out / record.name
            folder.mkdir(parents=True)
            for v, view in enumerate(VIEWS):
                number = (scene * GENERATIONS * len(VIEWS) + generation * len(VIEWS) + v) % len(videos)
                made, name = videos[number], video_name(sample, view)
                os.link(made.path, folder / name)
                views[view] = ViewFile(name, digests[number], made.bytes, made.mbit_s, made.psnr)
            record.write(folder)


@contextmanager
def timed(what: str, files: int) -> Iterator[None]:
    """Prints what happens in the context cost."""
    cpu, wall = time.process_time(), time.monotonic()
    yield
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:10} {cpu:8.1f} CPU s ({1000 * cpu / files:6.1f} ms a file) {wall:8.1f} s wall, peak {peak:.0f} MiB")


def main() -> None:
    """Makes, packs, checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--mbit-s", type=float, default=4.0, help="of the stand-in videos")
    options = parser.parse_args()
    files = options.scenes * GENERATIONS * len(VIEWS)
    config = load_config(PROFILE, [f"generate.generations={GENERATIONS}", "submission.team=benchmark"])
    with tempfile.TemporaryDirectory(prefix="magicdrive-package-") as name:
        folder = Path(name)
        videos = [
            encode_video(drift(n), folder / f"videos/{n}.mp4", fps=FPS, max_mbit_s=options.mbit_s)
            for n in range(DISTINCT)
        ]
        write_items(folder / "generated", videos, options.scenes)
        with timed("pack", files):
            package = pack(config, folder / "generated", folder / "out")
        with timed("validate", files):
            faults = validate(package.zip_path, Expected(options.scenes, GENERATIONS))
        size = package.zip_path.stat().st_size / 1e6
        rate = max(video.mbit_s for video in videos)
        print(f"{files} videos of at most {rate:.2f} Mbit/s, {size:.1f} MB, {len(faults)} faults")


if __name__ == "__main__":
    main()
