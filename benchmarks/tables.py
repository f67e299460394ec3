"""Time and memory of reading tables as large as those of all of nuScenes, and of making infos from them.

    python benchmarks/tables.py make /tmp/large --scenes 850
    python benchmarks/tables.py infos /tmp/large --processes 2

``make`` writes tables of the size and form of nuScenes trainval: 40 key frames a scene, 12 sensors at their rates,
1,360 annotations a scene, indented JSON, records of all scenes mixed. Pictures are hard links to a few files.
``infos`` runs ``build_infos`` on them and prints time, and the largest private memory of each process: forked processes
share what their parent has read.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from magicdrive_core.config.load import parse_config
from magicdrive_core.data.infos import build_infos
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.geometry.cameras import VIEWS

VERSION = "v1.0-large"
KEYS, OBJECTS = 40, 34  # key frames of a scene, objects in each
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
STEPS = {"LIDAR_TOP": 10, **dict.fromkeys(VIEWS, 6), **dict.fromkeys(RADARS, 7)}  # records from key frame to key frame
PERIOD, START = 500_000, 1_532_402_927_647_951  # microseconds
LINKS = 50_000  # to one picture file: file systems allow 65,000


def token(*parts: object) -> str:
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.write("[\n")
        for number, record in enumerate(records):
            file.write((",\n" if number else "") + json.dumps(record, indent=0))
        file.write("\n]")


def links(scene: int, kind: str, number: int, count: int, *more: object) -> dict[str, str]:
    return {
        "prev": token(kind, scene, number - 1, *more) if number else "",
        "next": token(kind, scene, number + 1, *more) if number < count - 1 else "",
    }


def pose_at(scene: int, seconds: float) -> dict[str, list[float]]:
    heading = 0.01 * scene + 0.02 * seconds
    rotation = [float(np.cos(heading / 2)), 0.0, 0.0, float(np.sin(heading / 2))]
    return {"rotation": rotation, "translation": [1000 + 8.123456789 * seconds, 600 + 0.1 * scene, 0.0]}


def sensor_rows(scenes: int) -> Iterator[tuple[int, str, int, int]]:
    """Yield scene, channel, number of the record and number of all; neighbours in the file are of different scenes."""
    for channel, steps in STEPS.items():
        count = (KEYS - 1) * steps + 1
        for number in range(count):
            for scene in range(scenes):
                yield scene, channel, number, count


def filename(scene: int, channel: str, number: int, stamp: int) -> str:
    folder = "samples" if number % STEPS[channel] == 0 else "sweeps"
    ending = "jpg" if channel in VIEWS else "pcd.bin" if channel == "LIDAR_TOP" else "pcd"
    return f"{folder}/{channel}/n015-2018-07-24-11-22-45+0800-{scene:04d}__{channel}__{stamp}.{ending}"


def sensor_data(scenes: int) -> Iterator[dict[str, Any]]:
    for scene, channel, number, count in sensor_rows(scenes):
        key, step = divmod(number, STEPS[channel])
        stamp = START + scene * 10**8 + number * PERIOD // STEPS[channel]
        yield {
            "token": token("data", scene, number, channel),
            "sample_token": token("sample", scene, key + (2 * step > STEPS[channel])),
            "ego_pose_token": token("data", scene, number, channel),
            "calibrated_sensor_token": token("calibration", scene, channel),
            "timestamp": stamp,
            "fileformat": "jpg" if channel in VIEWS else "pcd",
            "is_key_frame": step == 0,
            "height": 900 if channel in VIEWS else 0,
            "width": 1600 if channel in VIEWS else 0,
            "filename": filename(scene, channel, number, stamp),
            **links(scene, "data", number, count, channel),
        }


def make(root: Path, scenes: int) -> None:
    """Write the tables, maps and pictures."""
    folder = root / VERSION
    folder.mkdir(parents=True)
    every, keys = range(scenes), range(KEYS)
    channels = list(STEPS)
    tables: dict[str, Iterable[dict[str, Any]]] = {
        "attribute": [],
        "visibility": [],
        "map": [],
        "category": ({"token": token("category", 0), "name": "vehicle.car", "description": ""} for _ in range(1)),
        "sensor": ({"token": token("sensor", c), "channel": c, "modality": "camera"} for c in channels),
        "log": ({"token": token("log", s), "location": "town", "logfile": f"n015-{s}"} for s in every),
        "calibrated_sensor": (
            {
                "token": token("calibration", s, c),
                "sensor_token": token("sensor", c),
                "translation": [0.5, 0.1 * n, 1.5],
                "rotation": [0.5, -0.5, 0.5, -0.5]
                if c in VIEWS
                else [0.7071067811865476, 0.0, 0.0, -0.7071067811865475],
                "camera_intrinsic": [[1266.4, 0.0, 816.2], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]] if c in VIEWS else [],
            }
            for s in every
            for n, c in enumerate(channels)
        ),
        "scene": (
            {
                "token": token("scene", s),
                "log_token": token("log", s),
                "nbr_samples": KEYS,
                "first_sample_token": token("sample", s, 0),
                "last_sample_token": token("sample", s, KEYS - 1),
                "name": f"scene-{s:04d}",
                "description": "Parked cars, turn left, pedestrians",
            }
            for s in every
        ),
        "sample": (
            {
                "token": token("sample", s, key),
                "timestamp": START + s * 10**8 + key * PERIOD,
                "scene_token": token("scene", s),
                **links(s, "sample", key, KEYS),
            }
            for key in keys
            for s in every
        ),
        "instance": (
            {
                "token": token("instance", s, o),
                "category_token": token("category", 0),
                "nbr_annotations": KEYS,
                "first_annotation_token": token("annotation", s, 0, o),
                "last_annotation_token": token("annotation", s, KEYS - 1, o),
            }
            for s in every
            for o in range(OBJECTS)
        ),
        "sample_annotation": (
            {
                "token": token("annotation", s, key, o),
                "sample_token": token("sample", s, key),
                "instance_token": token("instance", s, o),
                "visibility_token": "4",
                "attribute_tokens": [token("attribute", 0)],
                "translation": [1000.123 + 4 * key + 3 * o, 590.456 + o, 0.789],
                "size": [1.92, 4.61, 1.73],
                "rotation": [0.9238795325112867, 0.0, 0.0, 0.3826834323650898],
                **links(s, "annotation", key, KEYS, o),
                "num_lidar_pts": 5,
                "num_radar_pts": 0,
            }
            for o in range(OBJECTS)
            for key in keys
            for s in every
        ),
        "sample_data": sensor_data(scenes),
        "ego_pose": (
            {
                "token": token("data", s, number, channel),
                "timestamp": START + s * 10**8 + number * PERIOD // STEPS[channel],
                **pose_at(s, number * PERIOD / STEPS[channel] / 1e6),
            }
            for s, channel, number, _ in sensor_rows(scenes)
        ),
    }
    for name, records in tables.items():
        write(folder / f"{name}.json", records)
    expansion = root / "maps/expansion/town.json"
    expansion.parent.mkdir(parents=True)
    expansion.write_text(json.dumps({"version": "1.3", "node": [], "polygon": [], "line": []}))
    _link_pictures(root, scenes)


def _link_pictures(root: Path, scenes: int) -> None:
    for channel in VIEWS:
        for folder in ("samples", "sweeps"):
            (root / folder / channel).mkdir(parents=True)
    sources: list[Path] = []
    pictures = ((s, c, n) for s, c, n, _ in sensor_rows(scenes) if c in VIEWS)
    for number, (scene, channel, row) in enumerate(pictures):
        if number % LINKS == 0:
            sources.append(root / f"picture-{len(sources)}.jpg")
            Image.new("RGB", (1600, 900)).save(sources[-1])
        stamp = START + scene * 10**8 + row * PERIOD // STEPS[channel]
        os.link(sources[-1], root / filename(scene, channel, row, stamp))


class Memory:
    """The largest private memory of this process and of its children, sampled ten times a second."""

    def __enter__(self) -> Memory:
        self.largest: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in self._processes():
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                    own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
                    self.largest[process] = max(self.largest.get(process, 0), own)

    def _processes(self) -> list[int]:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        return [os.getpid(), *map(int, children)]


def measure(root: Path, processes: int) -> None:
    """Read the tables, then make the infos, as `magicdrive infos` does."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:processes]))
    start, cpu = time.monotonic(), time.process_time()
    with Memory() as memory:
        tables = load_tables(root, VERSION)
    seconds, used = time.monotonic() - start, time.process_time() - cpu
    largest = memory.largest[os.getpid()] / 1e6
    print(f"tables of {len(tables.scene)} scenes: {seconds:.0f} s ({used:.0f} CPU s), {largest:.2f} GB", flush=True)
    del tables
    values = yaml.safe_load(Path("profiles/demo.yaml").read_text(encoding="utf-8"))
    values["data"] = {"root": str(root), "version": VERSION, "val_scenes": "auto"}
    start, cpu = time.monotonic(), sum(os.times()[:4])
    with Memory() as memory:
        build_infos(parse_config(values), root / "infos")
    sizes = ", ".join(f"{size / 1e6:.2f}" for size in memory.largest.values())
    print(
        f"infos: {(time.monotonic() - start) / 60:.1f} minutes with {processes} processes; GB of each process: {sizes}"
    )


def main() -> None:
    """Make tables, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("make", "infos"))
    parser.add_argument("root", type=Path)
    parser.add_argument("--scenes", type=int, default=850)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.work == "make":
        make(arguments.root, arguments.scenes)
    else:
        measure(arguments.root, arguments.processes)


if __name__ == "__main__":
    main()
