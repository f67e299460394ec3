"""The BEV maps of all frames, drawn once: a file a scene and number of cells (``bev.write_map``)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from magicdrive_core.config import STAGES, Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.bev import map_path, rasterise, write_map
from magicdrive_core.data.records import Outline, Scene
from magicdrive_core.data.scene_pool import count_workers, for_each_scene
from magicdrive_core.files import check_space
from magicdrive_core.progress import announce

SAMPLE = 4  # scenes, and frames of each, that are drawn to know how long all will take


def draw_maps(config: Config, scenes: Sequence[Scene], folder: Path) -> None:
    """Draws the maps that are not in ``folder`` yet, after saying how large they will be and how long it will take.

    Raises:
        MagicDriveError: a map is missing or broken, or the disk is too small.
    """
    frames = {index: len(scene) for index, scene in enumerate(scenes) if _missing(scene, config, folder)}
    if not frames:
        return
    size, seconds = _sample(config, [scenes[index] for index in list(frames)[:: -(-len(frames) // SAMPLE)]])
    amount, total = f"{sum(frames.values()):,} frames of {len(frames)} scenes", sum(frames.values())
    check_space(folder, "BEV maps", total * size, "free some space, or set conditions.maps to live")
    announce("BEV maps", amount, total * size, total * seconds / count_workers(len(frames)))
    for_each_scene(partial(_draw, config=config, scenes=scenes, folder=folder), list(frames), "BEV maps")


def used_cells(config: Config) -> list[int]:
    """The numbers of map cells that some size in use needs."""
    sizes = {bucket.resolution for stage in STAGES for bucket in config.training.stage(stage).buckets}
    return sorted({config.conditions.map_cells[size] for size in sizes | {config.generate.resolution}})


def _missing(scene: Scene | Outline, config: Config, folder: Path) -> list[int]:
    """The numbers of cells at which a scene's maps are not there yet."""
    return [cells for cells in used_cells(config) if not map_path(folder, scene.token, cells).is_file()]


def _draw(index: int, config: Config, scenes: Sequence[Scene], folder: Path) -> None:
    scene = scenes[index]
    vectors = open_adapter(config).vector_map(scene)
    for cells in _missing(scene, config, folder):
        bits = rasterise(vectors, scene.ego_to_global @ scene.lidar_to_ego, cells)
        write_map(map_path(folder, scene.token, cells), bits)


def _sample(config: Config, scenes: Sequence[Scene]) -> tuple[float, float]:
    """Bytes and seconds a frame at all numbers of cells, of a few frames of a few scenes; maps are read before."""
    count = size = 0
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for scene in scenes:
            vectors = open_adapter(config).vector_map(scene)
            lidar_to_global = (scene.ego_to_global @ scene.lidar_to_ego)[:: -(-len(scene) // SAMPLE)]
            count += len(lidar_to_global)
            for cells in used_cells(config):
                path = map_path(Path(folder), scene.token, cells)
                began = time.perf_counter()
                write_map(path, rasterise(vectors, lidar_to_global, cells))
                seconds += time.perf_counter() - began
                size += path.stat().st_size
    return size / count, seconds / count
