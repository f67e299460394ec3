"""The BEV maps of scenes: written once by the conditions stage and read from disk, or drawn on demand.

The setting ``conditions.maps`` chooses; both give the same bits. A file holds one scene at one number of cells.
"""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from magicdrive_core.config.schema import Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.bev_maps import Bits, rasterise
from magicdrive_core.data.records import Clip, Scene, SceneHeader
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import UNREADABLE_ZIP, atomic_file, check_space, file_name
from magicdrive_core.utils.process_pool import count_workers, for_each_scene
from magicdrive_core.utils.progress import announce

SAMPLE = 4  # scenes, and frames of each, that are drawn first to estimate size and time
_REMAKE = "run `dvc repro conditions` to make it again"


def map_path(folder: Path | str, scene: str, cells: int) -> Path:
    """Return the file of a scene's maps in a conditions folder.

    Args:
        folder: the conditions folder.
        scene: token of the scene.
        cells: cells along each side of a map.

    Returns:
        ``<folder>/bev/<cells>/<scene>.npz``.
    """
    return Path(folder) / "bev" / str(cells) / f"{file_name(scene)}.npz"


def write_map(path: Path, bits: Bits) -> None:
    """Write the maps of a scene as a compressed npz whose bytes depend only on the maps, completely or not at all.

    Args:
        path: the file, see ``map_path``.
        bits: (F, cells, cells) maps of the whole scene; bit c of a cell is layer c of ``MAP_LAYERS``.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("map.npy")  # dated 1980; numpy would write the current time
        entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, "w", force_zip64=True) as file:
            npy_format.write_array(file, np.ascontiguousarray(bits), allow_pickle=False)


def read_map(folder: Path | str, scene: str, cells: int) -> Bits:
    """Read the maps of a scene.

    Args:
        folder: the conditions folder.
        scene: token of the scene.
        cells: cells along each side of a map.

    Returns:
        (F, cells, cells); bit c of a cell is layer c of ``MAP_LAYERS``.

    Raises:
        MagicDriveError: the file is missing, incomplete or of another size.
    """
    path = map_path(folder, scene, cells)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            bits = archive["map"]
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", _REMAKE) from None
    except UNREADABLE_ZIP as error:
        raise MagicDriveError(f"{path} cannot be read: {error}", _REMAKE) from None
    if bits.dtype != np.uint8 or bits.ndim != 3 or bits.shape[1:] != (cells, cells):
        raise MagicDriveError(
            f"{path} has {bits.dtype} maps of shape {bits.shape}, expected uint8 (F, {cells}, {cells})", _REMAKE
        )
    return bits


class BevMaps:
    """The BEV maps of a project, from its cache or drawn on demand.

    Args:
        config: the whole configuration; its data and conditions sections are used.
        project: the project's folder.
        hold: how many bytes of whole scenes' maps stay in memory, the most recently used ones.
    """

    def __init__(self, config: Config, project: Path = Path(), *, hold: int = 0) -> None:
        self._cells, self._live = config.conditions.map_cells, config.conditions.maps == "live"
        self._folder = project / "artifacts/conditions"
        self._adapter = open_adapter(config, project)
        self._hold = hold
        self._held: dict[tuple[str, int], Bits] = {}  # the most recently used one is the last

    def of_scene(self, scene: Scene, size: str, *, draw: bool = False) -> Bits:
        """Return the maps of a whole scene.

        Args:
            scene: the scene, with the poses of the lidar.
            size: height and width of the video, such as "224x400"; ``conditions.map_cells`` says how many cells.
            draw: draw the maps even if they are cached, because the poses differ from those of the infos.

        Returns:
            (F, cells, cells); bit c of a cell is layer c of ``MAP_LAYERS``.

        Raises:
            MagicDriveError: the cached file or the vector map is missing or broken.
        """
        return self.of_clip(scene, Clip(scene.token, 0, len(scene)), size, draw=draw)

    def of_clip(self, scene: Scene, clip: Clip, size: str, *, draw: bool = False) -> Bits:
        """Return the maps of a clip's frames.

        Args:
            scene: the scene, with the poses of the lidar.
            clip: the frames.
            size: height and width of the video, such as "224x400"; ``conditions.map_cells`` says how many cells.
            draw: draw the maps even if they are cached, because the poses differ from those of the infos.

        Returns:
            (F, cells, cells); bit c of a cell is layer c of ``MAP_LAYERS``.

        Raises:
            MagicDriveError: the cached file or the vector map is missing or broken.
        """
        frames = slice(clip.start, clip.start + clip.frames)
        if draw or self._live:
            lidar_to_global = scene.ego_to_global[frames] @ scene.lidar_to_ego[frames]
            return rasterise(self._adapter.vector_map(scene), lidar_to_global, self._cells[size])
        return self._read(scene.token, self._cells[size])[frames]

    @property
    def held(self) -> int:
        """Bytes of maps in memory now."""
        return sum(bits.nbytes for bits in self._held.values())

    def _read(self, token: str, cells: int) -> Bits:
        bits = self._held.pop((token, cells), None)
        if bits is None:
            bits = read_map(self._folder, token, cells)
        self._held[token, cells] = bits
        while self._held and self.held > self._hold:
            del self._held[next(iter(self._held))]
        return bits


def draw_maps(config: Config, scenes: Sequence[Scene], folder: Path) -> None:
    """Draw the maps that ``folder`` lacks, after announcing their size and how long it will take.

    Args:
        config: the whole configuration.
        scenes: all scenes of the infos.
        folder: the conditions folder.

    Raises:
        MagicDriveError: a vector map is missing or broken, or the disk has too little space.
    """
    frames = {index: len(scene) for index, scene in enumerate(scenes) if _missing(scene, config, folder)}
    if not frames:
        return
    size, seconds = _sample(config, [scenes[index] for index in list(frames)[:: -(-len(frames) // SAMPLE)]])
    amount, total = f"{sum(frames.values()):,} frames of {len(frames)} scenes", sum(frames.values())
    check_space(folder, "BEV maps", total * size, "free some space, or set conditions.maps to live")
    announce("BEV maps", amount, total * size, total * seconds / count_workers(len(frames)))
    for_each_scene(partial(_draw_scene, config=config, scenes=scenes, folder=folder), list(frames), "BEV maps")


def used_cells(config: Config) -> list[int]:
    """List the numbers of map cells that the sizes in use need.

    Args:
        config: the whole configuration: sizes of training buckets and of generation, and ``conditions.map_cells``.

    Returns:
        Distinct numbers of cells along a side of a map, rising.
    """
    sizes = {bucket.resolution for stage in config.training.stages for bucket in config.training.stage(stage).buckets}
    return sorted({config.conditions.map_cells[size] for size in sizes | {config.generate.resolution}})


def _missing(scene: Scene | SceneHeader, config: Config, folder: Path) -> list[int]:
    """List the numbers of cells at which a scene's maps are not written yet."""
    return [cells for cells in used_cells(config) if not map_path(folder, scene.token, cells).is_file()]


def _draw_scene(index: int, config: Config, scenes: Sequence[Scene], folder: Path) -> None:
    scene = scenes[index]
    vectors = open_adapter(config).vector_map(scene)
    for cells in _missing(scene, config, folder):
        bits = rasterise(vectors, scene.ego_to_global @ scene.lidar_to_ego, cells)
        write_map(map_path(folder, scene.token, cells), bits)


def _sample(config: Config, scenes: Sequence[Scene]) -> tuple[float, float]:
    """Measure bytes and seconds a frame, over all numbers of cells; reading vector maps is not counted."""
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
