"""A map's polygons and lines by layer, for drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.maps import LINE_LAYERS, VectorMap, load_map
from magicdrive_core.data.records import MAP_LAYERS

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MapShapes:
    """The eight layers that the model knows, in metres of the global frame."""

    polygons: dict[str, list[list[Array]]]  # by layer: rings (K, 2) of each polygon, the outer one first
    lines: dict[str, list[Array]]  # by layer: points (K, 2) of each line


def read_shapes(root: Path, location: str) -> MapShapes:
    """Reads ``maps/expansion/<location>.json``.

    Raises:
        MagicDriveError: the file is missing, damaged, or of another version than 1.3.
    """
    return shapes_of(load_map(root, location))


def shapes_of(vector_map: VectorMap) -> MapShapes:
    """The paths of a map, polygons with their holes."""
    polygons: dict[str, list[list[Array]]] = {layer: [] for layer in MAP_LAYERS if layer not in LINE_LAYERS}
    lines: dict[str, list[Array]] = {layer: [] for layer in LINE_LAYERS}
    paths = np.split(vector_map.points, vector_map.offsets[1:-1]) if len(vector_map.layers) else []
    for points, layer, hole in zip(paths, vector_map.layers, vector_map.holes, strict=True):
        name = MAP_LAYERS[layer]
        if name in lines:
            lines[name].append(points)
        elif hole:
            polygons[name][-1].append(points)
        else:
            polygons[name].append([points])
    return MapShapes(polygons, lines)
