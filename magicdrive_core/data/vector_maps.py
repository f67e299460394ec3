"""Vector maps: the eight layers of the conditions as flat arrays of vertices, read from nuScenes map expansion 1.3."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from magicdrive_core.data.nuscenes_files import MAPS
from magicdrive_core.data.records import MAP_LAYERS
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json

LINE_LAYERS = ("road_divider", "lane_divider")
VERSION = "1.3"


@dataclass(frozen=True)
class VectorMap:
    """R paths (rings of polygons, and lines) with P vertices in total, in drawing order."""

    points: NDArray[np.float64]  # P, 2 metres in the global frame
    offsets: NDArray[np.int64]  # R + 1: path r has the vertices offsets[r] to offsets[r + 1]
    layers: NDArray[np.int64]  # R: index into MAP_LAYERS
    holes: NDArray[np.bool_]  # R: whether the path is a hole of the polygon before it
    bounds: NDArray[np.float64]  # R, 4: x_min, y_min, x_max, y_max in metres

    @classmethod
    def of(cls, paths: list[tuple[int, bool, NDArray[np.float64]]]) -> VectorMap:
        """Build a map from its paths; empty paths are dropped.

        Args:
            paths: index into ``MAP_LAYERS``, whether the path is a hole, and its (n, 2) vertices in metres of the
                global frame, in drawing order; a hole follows its polygon.

        Returns:
            The map.
        """
        paths = [path for path in paths if len(path[2])]
        return cls(
            points=np.concatenate([np.zeros((0, 2)), *(points for *_, points in paths)]),
            offsets=np.cumsum([0, *(len(points) for *_, points in paths)]),
            layers=np.array([layer for layer, *_ in paths], np.int64),
            holes=np.array([hole for _, hole, _ in paths], np.bool_),
            bounds=np.array([[*points.min(0), *points.max(0)] for *_, points in paths]).reshape(-1, 4),
        )


@lru_cache(maxsize=8)
def load_map(root: Path, location: str) -> VectorMap:
    """Read ``maps/expansion/<location>.json`` below a data root; a layer that the file lacks is empty.

    Polygons that cross themselves are left out as in the devkit, except in the drivable area. The last eight maps stay
    in memory.

    Args:
        root: the data root.
        location: name of the map, such as "singapore-onenorth".

    Returns:
        The map; equal arguments give the same object, so it must not be changed.

    Raises:
        MagicDriveError: the file is missing, not JSON, of another version than 1.3, or a path names a missing node.
    """
    path = Path(root) / "maps" / "expansion" / f"{location}.json"
    values = read_json(path, MAPS)
    if not isinstance(values, dict):
        raise MagicDriveError(f"{path} is not a map expansion file", MAPS)
    if values.get("version") != VERSION:
        raise MagicDriveError(f"{path} has map version {values.get('version')}, expected {VERSION}", MAPS)
    try:
        return VectorMap.of(_paths(values))
    except KeyError as error:
        raise MagicDriveError(f"{path} has no record or field {error}, which another record names", MAPS) from None


def _paths(values: dict[str, Any]) -> list[tuple[int, bool, NDArray[np.float64]]]:
    nodes = {node["token"]: (node["x"], node["y"]) for node in values["node"]}
    polygons = {polygon["token"]: polygon for polygon in values["polygon"]}
    lines = {line["token"]: line for line in values["line"]}

    def vertices(tokens: list[str]) -> NDArray[np.float64]:
        return np.array([nodes[token] for token in tokens], np.float64).reshape(-1, 2)

    paths = []
    for layer, name in enumerate(MAP_LAYERS):
        for record in values.get(name, []):
            if name in LINE_LAYERS:
                paths.append((layer, False, vertices(lines[record["line_token"]]["node_tokens"])))
                continue
            for token in record["polygon_tokens"] if "polygon_tokens" in record else [record["polygon_token"]]:
                outline = vertices(polygons[token]["exterior_node_tokens"])
                holes = [vertices(hole["node_tokens"]) for hole in polygons[token]["holes"]]
                holes = [hole for hole in holes if len(hole)]
                if name == "drivable_area" or shapely.Polygon(outline, holes).is_valid:
                    paths += [(layer, False, outline), *((layer, True, hole) for hole in holes)]
    return paths
