"""BEV maps: the eight map layers around the lidar, drawn as the devkit's ``get_map_mask`` draws them.

A map covers 100 m x 100 m, centred on the lidar and turned by the heading of the lidar's x axis. Bit c of a cell is
layer c of ``MAP_LAYERS``; index [i, j] is i along the lidar's x and j along its y. Polygons are filled with their
outlines, holes cleared, lines two cells thick. A hole that leaves the patch keeps its rim filled: in the devkit, which
cuts polygons at the patch before drawing, it is then part of the outline.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from magicdrive_core.data.maps import VectorMap
from magicdrive_core.data.patches import Pieces, line_pieces, polygon_pieces
from magicdrive_core.data.records import MAP_LAYERS
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_file

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
            _draw(polygons, lines, frame, canvas, out[start + frame])
    return out


def _draw(polygons: Pieces, lines: Pieces, frame: int, canvas: Bits, out: Bits) -> None:
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
