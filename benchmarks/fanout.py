"""Cost of sharing items among workers, without sampling and encoding: 600 items with copied videos.

    python benchmarks/fanout.py
    python benchmarks/fanout.py --profile

150 scenes of 41 frames, 4 generations. Instead of generating, one mp4 file of 0.6 MB (white noise at the cap, 16 frames
of 1600x900) is copied six times; all else is real: planning, fingerprints, claims, folders renamed and synced, records.
A second run finds all items finished: every file is read, compared, counted, and its first frame decoded. The figures
are wall and CPU time for each item; the target is at most 50 ms.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from magicdrive_core.config.load import load_config
from magicdrive_core.data.records import Scene
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.inference.claims import Claim
from magicdrive_core.inference.fan_out import Summary, share_items
from magicdrive_core.inference.items import Item, item_fingerprint, item_seed, list_items
from magicdrive_core.utils.files import atomic_folder, sha256_file
from magicdrive_core.video.encoder import EncodedVideo, encode_video
from magicdrive_core.video.item_record import ItemRecord, ViewFile, video_name

SCENES, FRAMES = 150, 41
VIDEO_FRAMES = 16
DIGESTS = {"model": "a" * 64, "versions": "sampler 1", "infos": "b" * 32}


def scenes() -> Iterator[Scene]:
    """Yields scenes without objects, of which only names and lengths are read."""
    for n in range(SCENES):
        yield Scene(
            token=f"{n:032x}",
            name=f"scene-{n:04}",
            split="val",
            location="nowhere",
            description="Nothing",
            tokens=[f"{n:016x}{frame:016x}" for frame in range(FRAMES)],
            key_frames=np.arange(FRAMES) % 6 == 0,
            timestamps=np.arange(FRAMES) * 83_333,
            lidar_to_ego=np.zeros((FRAMES, 4, 4)),
            ego_to_global=np.zeros((FRAMES, 4, 4)),
            pictures=[],
            intrinsics=np.zeros((FRAMES, 6, 3, 3)),
            camera_to_lidar=np.zeros((FRAMES, 6, 4, 4)),
            boxes=[],
        )


def noise(out: Path) -> EncodedVideo:
    """Encodes the largest video that a submission can hold."""
    rng = np.random.default_rng(0)
    shape = (PICTURE_HEIGHT, PICTURE_WIDTH, 3)
    frames = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(VIDEO_FRAMES))
    return encode_video(frames, out, fps=12, max_mbit_s=4.0, start=44.0, preset="ultrafast")


def run(out: Path, made: EncodedVideo) -> Summary:
    """Does what ``generate_items`` does, with copies of ``made`` instead of generated videos."""
    config = load_config("profiles/nuscenes.yaml")
    items = list_items(config, list(scenes()))
    prints = {item: item_fingerprint(config, item, DIGESTS) for item in items}
    video = made.path.read_bytes()

    def make(item: Item, _: Claim) -> Future[None]:
        sample = item.name.split("_")[0]
        with atomic_folder(out / item.name) as folder:
            views = {}
            for view in VIEWS:
                path = folder / video_name(sample, view)
                path.write_bytes(video)
                views[view] = ViewFile(path.name, sha256_file(path), made.bytes, made.mbit_s, made.psnr)
            ItemRecord(
                fingerprint=prints[item],
                sample=sample,
                scene=item.clip.scene,
                scene_name=item.clip.scene,
                start=0,
                generated=item.clip.frames,
                frames=item.kept,
                fps=12,
                generation=item.generation,
                caption="",
                seed=item_seed(config, item),
                size=config.generate.resolution,
                lineage=DIGESTS,
                seconds={"sample": 0.0, "decode_and_encode": 0.0},
                views=views,
            ).write(folder)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    return share_items(items, out, prints.__getitem__, make)


def timed(work: Callable[[], Summary], title: str) -> None:
    """Prints the cost of one run for each item."""
    wall, processor = time.perf_counter(), time.process_time()
    summary = work()
    count = len(summary.made) + len(summary.skipped)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{title}: {len(summary.made)} made, {len(summary.skipped)} skipped;"
        f" {1000 * processor / count:.1f} ms of CPU and {1000 * wall / count:.1f} ms of wall time an item"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="say what takes the time")
    parser.add_argument("--folder", help="below which the items are written (needs 2.2 GB); by default that of TMPDIR")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        out, video = Path(folder, "items"), noise(Path(folder, "noise.mp4"))
        if arguments.profile:
            with cProfile.Profile() as profile:
                run(out, video)
            pstats.Stats(profile).sort_stats("cumulative").print_stats(25)
            return
        timed(lambda: run(out, video), "new")
        timed(lambda: run(out, video), "done before")


if __name__ == "__main__":
    main()
