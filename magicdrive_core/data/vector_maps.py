"""Vector maps: the eight layers of the conditions as flat arrays of vertices, read from nuScenes map expansion 1.3."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from magicdrive_core.data.limits import check_path, check_positions, is_number
from magicdrive_core.data.nuscenes_files import MAPS
from magicdrive_core.data.records import MAP_LAYERS
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json

Path2D = tuple[int, bool, NDArray[np.float64]]  # index into MAP_LAYERS, whether it is a hole, (n, 2) vertices

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
    def of(cls, paths: list[Path2D]) -> VectorMap:
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
        MagicDriveError: the file is missing, not JSON, of another version than 1.3, or a record is missing or
            impossible; the message names it.
    """
    check_path(location, f"{Path(root) / 'maps/expansion'}: the location of a log")
    path = Path(root) / "maps" / "expansion" / f"{location}.json"
    values = read_json(path, MAPS)
    if not isinstance(values, dict):
        raise MagicDriveError(f"{path} is not a map expansion file", MAPS)
    if values.get("version") != VERSION:
        raise MagicDriveError(f"{path} has map version {values.get('version')}, expected {VERSION}", MAPS)
    return _Expansion(path, values).vector_map()


class _Expansion:
    """The records of a map expansion file, checked as they are used.

    Args:
        path: the file, for messages.
        values: its decoded content.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path, self._values = path, values
        self._nodes = self._by_token("node")
        self._polygons = self._by_token("polygon")
        self._lines = self._by_token("line")

    def vector_map(self) -> VectorMap:
        """Collect the paths of the eight layers.

        Returns:
            The map. A shape that several records of a layer name is there once, at the place of the last of them: in
            some towns 676 road blocks name one ring, and drawing it again changes nothing.
        """
        shapes: dict[tuple[int, Any], list[Path2D]] = {}
        for layer, name in enumerate(MAP_LAYERS):
            for record in self._list(name):
                for token in self._shapes_of(name, record):
                    key = layer, self._token(name, token)
                    known = key in shapes
                    shapes[key] = shapes.pop(key) if known else self._shape(layer, token)
        return VectorMap.of([path for shape in shapes.values() for path in shape])

    def _shapes_of(self, name: str, record: dict[str, Any]) -> list[Any]:
        """List the tokens of the lines or polygons that a record of a layer names."""
        if name in LINE_LAYERS:
            return [self._field(name, record, "line_token")]
        if "polygon_tokens" not in record:
            return [self._field(name, record, "polygon_token")]
        if not isinstance(record["polygon_tokens"], list):
            raise self._fault(f"the polygon_tokens of a record of {name} are not a list")
        return record["polygon_tokens"]

    def _shape(self, layer: int, token: Any) -> list[Path2D]:
        return (self._line if MAP_LAYERS[layer] in LINE_LAYERS else self._polygon)(layer, token)

    def _line(self, layer: int, token: Any) -> list[Path2D]:
        vertices = self._vertices(
            f"line {token}", self._field("line", self._find(self._lines, "line", token), "node_tokens")
        )
        if len(vertices) == 1:
            raise self._fault(f"line {token} has a single node")
        return [(layer, False, vertices)]

    def _polygon(self, layer: int, token: Any) -> list[Path2D]:
        """Read the outline and the holes of a polygon; none if it crosses itself and is not a drivable area."""
        record = self._find(self._polygons, "polygon", token)
        outline = self._vertices(f"polygon {token}", self._field("polygon", record, "exterior_node_tokens"))
        holes = [
            self._vertices(f"a hole of polygon {token}", self._field("hole", hole, "node_tokens"))
            for hole in self._records_of(self._field("polygon", record, "holes"), f"holes of polygon {token}")
        ]
        holes = [hole for hole in holes if len(hole)]
        if any(0 < len(ring) < 3 for ring in (outline, *holes)) or (holes and not len(outline)):
            raise self._fault(f"polygon {token} has a ring of fewer than three nodes")
        if MAP_LAYERS[layer] != "drivable_area" and not shapely.Polygon(outline, holes).is_valid:
            return []
        return [(layer, False, outline), *((layer, True, hole) for hole in holes)]

    def _vertices(self, where: str, tokens: Any) -> NDArray[np.float64]:
        if not isinstance(tokens, list):
            raise self._fault(f"the nodes of {where} are not a list of tokens")
        nodes = [self._find(self._nodes, "node", token) for token in tokens]
        points = [(self._field("node", node, "x"), self._field("node", node, "y")) for node in nodes]
        for token, point in zip(tokens, points, strict=True):
            if not all(map(is_number, point)):
                raise self._fault(f"node {token} is not at two finite numbers")
        vertices = np.array(points, np.float64).reshape(-1, 2)
        check_positions(vertices, lambda row: f"{self._path}: node {tokens[row]}")
        return vertices

    def _list(self, name: str) -> list[dict[str, Any]]:
        return self._records_of(self._values.get(name, []), f"the layer {name}")

    def _records_of(self, values: Any, where: str) -> list[dict[str, Any]]:
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self._fault(f"{where} is not a list of records")
        return values

    def _by_token(self, name: str) -> dict[str | None, dict[str, Any]]:
        out: dict[str | None, dict[str, Any]] = {}
        for record in self._list(name):
            token = self._token(name, self._field(name, record, "token"))
            if token in out and out[token] != record:
                raise self._fault(f"two different records of {name} have the token {token!r}")
            out[token] = record
        return out

    def _token(self, name: str, token: Any) -> str | None:
        if not isinstance(token, str | None):  # null is the token of a ring in some towns
            raise self._fault(f"a token of {name} is {token!r}, expected a text")
        return token

    def _find(self, records: dict[str | None, dict[str, Any]], name: str, token: Any) -> dict[str, Any]:
        found = records.get(self._token(name, token))
        if found is None:
            raise self._fault(f"{name} has no record {token!r}, which another record names")
        return found

    def _field(self, name: str, record: dict[str, Any], field: str) -> Any:
        if field not in record:
            raise self._fault(f"a record of {name} has no {field}")
        return record[field]

    def _fault(self, text: str) -> MagicDriveError:
        return MagicDriveError(f"{self._path}: {text}", MAPS)
