"""CPU time and size of data preparation for each frame, and a projection to all of nuScenes.

    python benchmarks/data.py ../shared/data/nuscenes-drive v1.0-drive
    python benchmarks/data.py ../shared/data/nuscenes-drive v1.0-drive --pictures ../shared/data/nuscenes-one

Maps are drawn by this project and by the devkit, on the same frames in the same process. The projection is for 850
scenes of 220 frames on 16 cores: one core reads the tables and writes frames.parquet, one process a core builds scenes
and draws maps. Pictures are checked (length and header), not decoded. Encoding by VAE and T5 is not included: it needs
a GPU, and `magicdrive text` and `magicdrive latents` announce how long they take before they start.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from nuscenes.map_expansion.map_api import NuScenesMap, NuScenesMapExplorer

from magicdrive_core.data.bev_maps import rasterise
from magicdrive_core.data.infos import InfosWriter
from magicdrive_core.data.map_cache import write_map
from magicdrive_core.data.nuscenes_files import stream_records
from magicdrive_core.data.nuscenes_scenes import build_scene
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.data.pictures import check_pictures
from magicdrive_core.data.records import MAP_LAYERS, Scene
from magicdrive_core.data.scene_store import read_scene, scene_path, write_scene
from magicdrive_core.data.vector_maps import load_map
from magicdrive_core.geometry import poses

SCENES, FRAMES, CORES, VIEWS = 850, 220, 16, 6
TRAIN_FRAMES, PUBLISHED_BYTES = 700 * FRAMES, 124e9
TRAINVAL_RECORDS = 2_631_083 + 1_166_187  # sample_data and sample_annotation


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Run a function twice; return the shorter CPU time in seconds, and the result."""
    times = []
    for _ in range(2):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return min(times), result


def join_scene(folder: Path, scene: Scene) -> None:
    """Write one scene as the process that writes frames.parquet does, without the lengths of pictures."""
    with InfosWriter(folder, {}) as writer:
        writer.add(read_scene(scene_path(folder, scene.name)))


def draw_lines(lines: Any, mask: np.ndarray) -> np.ndarray:
    """Draw lines part by part: devkit 1.2 cannot iterate a line of several parts under shapely 2."""
    for line in shapely.get_parts(lines):
        cv2.polylines(mask, [shapely.get_coordinates(line).astype(np.int32)], False, 1, 2)
    return mask


def main() -> None:
    """Measure on one scene and project to all of nuScenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("version")
    parser.add_argument("--pictures", type=Path, help="a folder of real pictures, to measure the time of checking them")
    arguments = parser.parse_args()
    root = arguments.root

    load, tables = seconds(lambda: load_tables(root, arguments.version))
    build, scene = seconds(lambda: build_scene(tables, tables.scene[0], "both", published=False))
    F = len(scene)
    with tempfile.TemporaryDirectory() as folder:
        keep, _ = seconds(lambda: write_scene(Path(folder), scene))
        join, _ = seconds(lambda: join_scene(Path(folder), scene))
    count = sum(
        1
        for name in ("sample_data", "sample_annotation")
        for _ in stream_records(root / arguments.version / f"{name}.json")
    )
    print(f"tables {load:.2f} s for {count} records")
    print(
        f"infos {1e3 * build / F:.2f} ms a frame ({F} frames), {1e3 * keep / F:.2f} ms to write,"
        f" {1e3 * join / F:.2f} ms to add to frames.parquet"
    )
    vectors, devkit = load_map(root, scene.location), NuScenesMap(str(root), scene.location)
    NuScenesMapExplorer.mask_for_lines = staticmethod(draw_lines)
    lidar_to_global = scene.ego_to_global @ scene.lidar_to_ego
    drawing = size = 0.0
    for cells in (200, 400):
        ours, bits = seconds(lambda cells=cells: rasterise(vectors, lidar_to_global, cells))
        start = time.process_time()
        for pose in lidar_to_global:
            patch = (pose[0, 3], pose[1, 3], 100, 100)
            devkit.get_map_mask(patch, np.degrees(poses.yaw(pose)), list(MAP_LAYERS), (cells, cells))
        theirs = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            write, _ = seconds(lambda folder=folder, bits=bits: write_map(Path(folder) / "map.npz", bits))
            stored = (Path(folder) / "map.npz").stat().st_size / F
        print(
            f"map {cells}: {1e3 * ours / F:.2f} ms a frame, {1e3 * write / F:.2f} ms to write; devkit"
            f" {1e3 * theirs / F:.1f} ms, {theirs / ours:.0f} times; {stored:.0f} bytes a frame"
        )
        drawing += (ours + write) / F
        size += stored
    cache = TRAIN_FRAMES * size
    share = PUBLISHED_BYTES / cache
    print(f"maps of train at both sizes: {cache / 1e9:.2f} GB, 1/{share:.0f} of {PUBLISHED_BYTES / 1e9:.0f} GB")

    check = 0.0
    if arguments.pictures:
        files = {str(path.relative_to(arguments.pictures)): (1600, 900) for path in arguments.pictures.rglob("*.jpg")}
        spent, faults = seconds(lambda: check_pictures(arguments.pictures, files))
        check = spent / len(files)
        print(f"checking a picture {1e3 * check:.3f} ms ({len(files)} pictures, {len(faults)} faults)")
    frames = SCENES * FRAMES
    read = load * TRAINVAL_RECORDS / count
    single = read + frames * join / F
    parallel = frames * ((build + keep) / F + VIEWS * check + drawing) / CORES
    print(
        f"{SCENES} scenes on {CORES} cores: tables {read / 60:.1f} min and frames.parquet"
        f" {(single - read) / 60:.1f} min on one core, scenes and maps {parallel / 60:.1f} min on all:"
        f" {(single + parallel) / 60:.1f} min. Text and latents need a GPU and are not included"
    )


if __name__ == "__main__":
    main()
