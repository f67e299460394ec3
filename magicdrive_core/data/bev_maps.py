"""BEV maps: the eight map layers around the lidar, drawn as the devkit's ``get_map_mask`` draws them.

A map covers 100 m x 100 m, centred on the lidar and turned by the heading of the lidar's x axis. Bit c of a cell is
layer c of ``MAP_LAYERS``; index [i, j] is i along the lidar's x and j along its y. Polygons are filled with their
outlines, holes cleared, lines two cells thick. A hole that leaves the patch keeps its rim filled: in the devkit, which
cuts polygons at the patch before drawing, it is then part of the outline.
"""

from __future__ import annotations

import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from magicdrive_core.config.schema import STAGES, Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.records import MAP_LAYERS, Clip, Outline, Scene
from magicdrive_core.data.vector_maps import Pieces, VectorMap, line_pieces, polygon_pieces
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_file, check_space
from magicdrive_core.utils.process_pool import count_workers, for_each_scene
from magicdrive_core.utils.progress import announce

Floats = NDArray[np.float64]
Bits = NDArray[np.uint8]

_BLOCK = 64  # frames that are prepared together: enough to be fast, few enough to stay small


def rasterise(vectors: VectorMap, lidar_to_global: Floats, cells: int) -> Bits:
    """The BEV maps of frames.

    Args:
        vectors: the map of the scene's location.
        lidar_to_global: (F, 4, 4).
        cells: a side.

    Returns:
        (F, cells, cells), bit c = layer c.
    """
    out = np.zeros((len(lidar_to_global), cells, cells), np.uint8)
    # A column of margin: fillPoly draws what lies beyond the left rim of its canvas onto the rim (OpenCV 4.11).
    canvas = np.empty((len(MAP_LAYERS), cells, cells + 1), np.uint8)
    for start in range(0, len(out), _BLOCK):
        block = lidar_to_global[start : start + _BLOCK]
        centres, headings = block[:, :2, 3], np.arctan2(block[:, 1, 0], block[:, 0, 0])
        polygons = polygon_pieces(vectors, centres, headings, cells)
        lines = line_pieces(vectors, centres, headings, cells)
        for frame in range(len(block)):
            _draw_patches(polygons, lines, frame, canvas, out[start + frame])
    return out


def _draw_patches(polygons: Pieces, lines: Pieces, frame: int, canvas: Bits, out: Bits) -> None:
    """Draws one frame: each layer that it has on a canvas of its own (cells, cells + 1), all of them into ``out``."""
    drawn = polygons.ends[1:] > polygons.ends[:-1]
    fills, strokes = np.flatnonzero((polygons.frames == frame) & drawn), np.flatnonzero(lines.frames == frame)
    used = {layer: canvas[layer] for layer in {*polygons.layers[fills].tolist(), *lines.layers[strokes].tolist()}}
    for mask in used.values():
        mask.fill(0)
    for piece in fills.tolist():
        vertices = polygons.vertices[polygons.ends[piece] : polygons.ends[piece + 1]]
        layer, hole = int(polygons.layers[piece]), polygons.holes[piece]
        cv2.fillPoly(used[layer], [vertices], [0] if hole else [1 << layer], offset=(1, 0))
        if hole and polygons.cut[piece]:
            cv2.polylines(used[layer][:, 1:], [vertices], True, [1 << layer])
    for layer, mask in used.items():
        pieces = strokes[lines.layers[strokes] == layer].tolist()
        paths = [lines.vertices[lines.ends[piece] : lines.ends[piece + 1]] for piece in pieces]
        cv2.polylines(mask[:, 1:], paths, False, [1 << layer], 2)
    if used:
        first, *others = used.values()
        for mask in others:
            cv2.bitwise_or(first, mask, dst=first)
        cv2.transpose(first[:, 1:], dst=out)


def unpack(bits: Bits) -> Bits:
    """(..., h, w) of bits -> (..., 8, h, w) of 0 and 1."""
    return np.stack([(bits >> layer) & 1 for layer in range(len(MAP_LAYERS))], axis=-3)


def map_path(folder: Path | str, scene: str, cells: int) -> Path:
    """The file of a scene's maps, by its token, in a conditions folder."""
    return Path(folder) / "bev" / str(cells) / f"{scene}.npz"


def write_map(path: Path, bits: Bits) -> None:
    """Writes the maps (F, h, w) of a scene as a compressed npz whose bytes depend on the maps alone."""
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("map.npy")  # dated 1980, where numpy would write the time of day
        entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, "w", force_zip64=True) as file:
            npy_format.write_array(file, np.ascontiguousarray(bits), allow_pickle=False)


def read_map(folder: Path | str, scene: str, cells: int) -> Bits:
    """The maps (F, cells, cells) of a scene, by its token, from a conditions folder.

    Raises:
        MagicDriveError: not there, half-written or of another size.
    """
    path = map_path(folder, scene, cells)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            bits = archive["map"]
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", _REMAKE) from None
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise MagicDriveError(f"{path} cannot be read: {error}", _REMAKE) from None
    if bits.dtype != np.uint8 or bits.ndim != 3 or bits.shape[1:] != (cells, cells):
        raise MagicDriveError(f"{path} holds {bits.dtype} {bits.shape}, not uint8 maps of {cells} cells", _REMAKE)
    return bits


_REMAKE = "run `dvc repro conditions` to make it again"


# BEV maps of clips: read from what the conditions stage wrote, or drawn when they are asked for (conditions.maps).


class BevMaps:
    """The maps of a project. Both ways give the same bits.

    Args:
        config: data and conditions.
        project: the project's folder.
        hold: bytes of whole scenes' maps that are kept, the ones that were asked for last.
    """

    def __init__(self, config: Config, project: Path = Path(), *, hold: int = 0) -> None:
        self._cells, self._live = config.conditions.map_cells, config.conditions.maps == "live"
        self._folder = project / "artifacts/conditions"
        self._adapter = open_adapter(config, project)
        self._hold = hold
        self._held: dict[tuple[str, int], Bits] = {}  # the one that was asked for last is the last one

    def of_scene(self, scene: Scene, size: str, *, draw: bool = False) -> Bits:
        """The maps of a whole scene, (F, cells, cells), bit c = layer c.

        Args:
            scene: where the lidar is.
            size: of the video, for example "224x400".
            draw: even where the cache has them, because the scene's poses are not those of the infos.

        Raises:
            MagicDriveError: the cache or the map is missing or broken.
        """
        return self.of_clip(scene, Clip(scene.token, 0, len(scene)), size, draw=draw)

    def of_clip(self, scene: Scene, clip: Clip, size: str, *, draw: bool = False) -> Bits:
        """The maps of a clip's frames, as ``of_scene``."""
        frames = slice(clip.start, clip.start + clip.frames)
        if draw or self._live:
            lidar_to_global = scene.ego_to_global[frames] @ scene.lidar_to_ego[frames]
            return rasterise(self._adapter.vector_map(scene), lidar_to_global, self._cells[size])
        return self._read(scene.token, self._cells[size])[frames]

    @property
    def held(self) -> int:
        """Bytes that are kept now."""
        return sum(bits.nbytes for bits in self._held.values())

    def _read(self, token: str, cells: int) -> Bits:
        bits = self._held.pop((token, cells), None)
        if bits is None:
            bits = read_map(self._folder, token, cells)
        self._held[token, cells] = bits
        while self._held and self.held > self._hold:
            del self._held[next(iter(self._held))]
        return bits


# The BEV maps of all frames, drawn once: a file a scene and number of cells (``bev.write_map``).

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
    for_each_scene(partial(_draw_scene, config=config, scenes=scenes, folder=folder), list(frames), "BEV maps")


def used_cells(config: Config) -> list[int]:
    """The numbers of map cells that some size in use needs."""
    sizes = {bucket.resolution for stage in STAGES for bucket in config.training.stage(stage).buckets}
    return sorted({config.conditions.map_cells[size] for size in sizes | {config.generate.resolution}})


def _missing(scene: Scene | Outline, config: Config, folder: Path) -> list[int]:
    """The numbers of cells at which a scene's maps are not there yet."""
    return [cells for cells in used_cells(config) if not map_path(folder, scene.token, cells).is_file()]


def _draw_scene(index: int, config: Config, scenes: Sequence[Scene], folder: Path) -> None:
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
