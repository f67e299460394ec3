"""nuScenes map expansion, version 1.3: the eight layers that the network sees, as flat arrays of vertices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from magicdrive_core.data.records import MAP_EXTENT, MAP_LAYERS
from magicdrive_core.data.roots import MAPS
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json

LINE_LAYERS = ("road_divider", "lane_divider")
VERSION = "1.3"


@dataclass(frozen=True)
class VectorMap:
    """R paths (rings of polygons, and lines) with P vertices in all, in drawing order."""

    points: NDArray[np.float64]  # P, 2 metres in the global frame
    offsets: NDArray[np.int64]  # R + 1: path r has the vertices offsets[r] to offsets[r + 1]
    layers: NDArray[np.int64]  # R: index into MAP_LAYERS
    holes: NDArray[np.bool_]  # R: a hole of the polygon before it
    bounds: NDArray[np.float64]  # R, 4: x_min, y_min, x_max, y_max in metres

    @classmethod
    def of(cls, paths: list[tuple[int, bool, NDArray[np.float64]]]) -> VectorMap:
        """A map of (layer, is a hole, vertices (n, 2)) in drawing order; empty paths are dropped."""
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
    """Reads ``maps/expansion/<location>.json`` below a data root. A layer that the file lacks is empty.

    Polygons that cross themselves are left out, as the devkit does, except in the drivable area.

    Raises:
        MagicDriveError: no such file, not JSON, another version than 1.3, or a path through a missing node.
    """
    path = Path(root) / "maps" / "expansion" / f"{location}.json"
    values = read_json(path, MAPS)
    version = values.get("version", "without a version") if isinstance(values, dict) else "of another kind"
    if version != VERSION:
        raise MagicDriveError(f"{path} is a map {version}, map expansion {VERSION} is needed", MAPS)
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


# The paths of a map as they lie in the square patches around the lidar of many frames, ready to be drawn.
#
# F frames, P pairs of a frame and a path that is near it, n vertices in all. Vertices are in cells: x and y along the
# axes of the lidar, (0, 0) at the patch's corner.

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

HALF = MAP_EXTENT / 2
_LOCAL_PATCH = shapely.box(-HALF, -HALF, HALF, HALF)
_IS_LINE = np.array([name in LINE_LAYERS for name in MAP_LAYERS])


@dataclass(frozen=True)
class Pieces:
    """What to draw, frame after frame in drawing order."""

    vertices: NDArray[np.int32]  # n, 2 cells
    ends: Ints  # P + 1: piece p has the vertices ends[p] to ends[p + 1]
    frames: Ints  # P
    layers: Ints  # P
    holes: Flags  # P
    cut: Flags  # P: a part lies beyond the patch


@dataclass(frozen=True)
class _Pairs:
    """Paths near the patches of frames, with their vertices in cells."""

    frames: Ints  # P
    paths: Ints  # P
    counts: Ints  # P, none is 0
    rows: Ints  # n: vertices of the map
    points: Floats  # n, 2
    side: NDArray[np.int8]  # n: which side of the patch a vertex lies beyond, 0 none

    @classmethod
    def near(cls, vectors: VectorMap, centres: Floats, headings: Floats, wanted: Flags, cells: int) -> _Pairs:
        reach = HALF * np.sqrt(2)  # half a diagonal
        low, high = vectors.bounds[:, :2], vectors.bounds[:, 2:]
        near: Flags = ((low < centres[:, None] + reach) & (high > centres[:, None] - reach)).all(2) & wanted
        frames, paths = np.nonzero(near)
        counts = vectors.offsets[paths + 1] - vectors.offsets[paths]
        rows: Ints = np.arange(counts.sum()) + np.repeat(vectors.offsets[paths] - (np.cumsum(counts) - counts), counts)
        frame = np.repeat(frames, counts)
        x, y = (vectors.points[rows] - centres[frame]).T
        cosine, sine = np.cos(headings)[frame], np.sin(headings)[frame]
        points = np.stack([x * cosine + y * sine, y * cosine - x * sine], axis=1) * (cells / MAP_EXTENT) + cells / 2
        return cls(frames, paths, counts, rows, points, _side_beyond(points, cells))


def polygon_pieces(vectors: VectorMap, centres: Floats, headings: Floats, cells: int) -> Pieces:
    """The rings near each frame, so that filling them gives inside the patch what cut rings would give.

    Args:
        vectors: the map.
        centres: (F, 2) of the patches, metres in the global frame.
        headings: (F) of their x axes, radians.
        cells: a side.
    """
    pairs = _Pairs.near(vectors, centres, headings, ~_IS_LINE[vectors.layers], cells)
    before, following = _neighbours(pairs.counts)
    # A vertex between two others beyond the same side of the patch changes nothing inside it. Most vertices are such.
    side = pairs.side
    needed = (side == 0) | (side != side[before]) | (side != side[following])
    counts = _sum_by_path(needed, pairs.counts)
    points, side = pairs.points[needed], side[needed]
    _, following = _neighbours(counts)
    # Each vertex is followed by the points where its edge enters and leaves the patch, so that the edge falls on the
    # same cells as one that was cut there. Outer vertices may then move out, where no rounding brings them in again.
    edges = np.flatnonzero(side != side[following])
    enter, leave, crossing = _clip(points[edges], points[following[edges]], cells)
    path = np.empty((len(points), 3, 2))
    path[:, 0] = points + cells * (points > cells) - cells * (points < 0)
    path[edges, 1], path[edges, 2] = enter, leave
    keep = np.zeros((len(points), 3), np.bool_)
    keep[:, 0] = True
    keep[edges, 1] = crossing & (side[edges] != 0)
    keep[edges, 2] = crossing & (side[following[edges]] != 0)
    return Pieces(
        vertices=np.rint(path[keep]).astype(np.int32),
        ends=np.append(0, np.cumsum(_sum_by_path(keep.sum(1), counts))),
        frames=pairs.frames,
        layers=vectors.layers[pairs.paths],
        holes=vectors.holes[pairs.paths],
        cut=_sum_by_path(pairs.side != 0, pairs.counts) > 0,
    )


def line_pieces(vectors: VectorMap, centres: Floats, headings: Floats, cells: int) -> Pieces:
    """The parts of lines that lie inside the patch of each frame; arguments as for ``polygon_pieces``."""
    pairs = _Pairs.near(vectors, centres, headings, _IS_LINE[vectors.layers], cells)
    beyond = _sum_by_path(pairs.side != 0, pairs.counts)
    whole = beyond == 0
    pair = np.repeat(np.arange(len(pairs.paths)), pairs.counts)
    changes = (pairs.side[1:] != pairs.side[:-1]) & (pair[1:] == pair[:-1])  # an edge that may cross the patch
    crosses = np.unique(pair[1:][changes])
    part_points, parts, owners = _cut(vectors, pairs, crosses, centres, headings)
    points = np.concatenate([pairs.points[whole[pair]], (part_points + HALF) * (cells / MAP_EXTENT)])
    counts = np.concatenate([pairs.counts[whole], parts])
    owners = np.concatenate([np.flatnonzero(whole), owners])
    return Pieces(
        vertices=points.astype(np.int32),
        ends=np.append(0, np.cumsum(counts)),
        frames=pairs.frames[owners],
        layers=vectors.layers[pairs.paths[owners]],
        holes=np.zeros(len(owners), np.bool_),
        cut=beyond[owners] > 0,
    )


def _cut(
    vectors: VectorMap, pairs: _Pairs, which: Ints, centres: Floats, headings: Floats
) -> tuple[Floats, Ints, Ints]:
    """The parts of some pairs' lines inside the patch: vertices in metres about its centre, counts, pairs.

    The steps are the devkit's, rounding for rounding: an end that was cut lies on the rim, the last bit of its place
    decides on which cell it falls, and with it where a straight line across the patch changes rows.
    """
    frames = pairs.frames[which]
    square = HALF * np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]])
    patches = shapely.polygons(_turned(centres[:, None] + square, headings[:, None], centres[:, None]))
    chosen = np.isin(np.repeat(np.arange(len(pairs.paths)), pairs.counts), which)
    lines = shapely.linestrings(
        vectors.points[pairs.rows[chosen]], indices=np.repeat(np.arange(len(which)), pairs.counts[which])
    )
    lines, owner = _parts(shapely.intersection(lines, patches[frames]))
    which, frames = which[owner], frames[owner]
    points, line = shapely.get_coordinates(lines, return_index=True)
    about = centres[frames[line]]
    local = _turned(points, -headings[frames[line]], about) - about
    lines, owner = _parts(shapely.intersection(shapely.linestrings(local, indices=line), _LOCAL_PATCH))
    return shapely.get_coordinates(lines), shapely.get_num_coordinates(lines).astype(np.int64), which[owner]


def _parts(geometries: NDArray[np.object_]) -> tuple[NDArray[np.object_], Ints]:
    """The lines among the parts of geometries, and which geometry each comes from."""
    parts, owners = shapely.get_parts(geometries, return_index=True)
    lines = (shapely.get_type_id(parts) == shapely.GeometryType.LINESTRING) & ~shapely.is_empty(parts)
    return parts[lines], owners[lines]


def _turned(points: Floats, angle: Floats, origin: Floats) -> Floats:
    """Points (..., 2) turned about ``origin``, with the order of operations of ``shapely.affinity.rotate``."""
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y, x_0, y_0 = points[..., 0], points[..., 1], origin[..., 0], origin[..., 1]
    turned_x = cosine * x - sine * y + (x_0 - x_0 * cosine + y_0 * sine)
    turned_y = sine * x + cosine * y + (y_0 - x_0 * sine - y_0 * cosine)
    return np.stack([turned_x, turned_y], axis=-1)


def _neighbours(counts: Ints) -> tuple[Ints, Ints]:
    """For closed rings of so many vertices: the vertices before and after every vertex."""
    place = np.arange(counts.sum())
    end, full = np.cumsum(counts), counts > 0
    first, last = (end - counts)[full], end[full] - 1
    before, following = place - 1, place + 1
    before[first], following[last] = last, first
    return before, following


def _sum_by_path(values: NDArray[np.generic], counts: Ints) -> Ints:
    """Sums over the vertices of each path."""
    sums = np.append(0, np.cumsum(values, dtype=np.int64))
    end = np.cumsum(counts)
    return sums[end] - sums[end - counts]


def _side_beyond(points: Floats, cells: int) -> NDArray[np.int8]:
    """Which side of the patch each point lies beyond: 0 none, 1 to 4 (the highest that fits, where two do)."""
    side: NDArray[np.int8] = np.zeros(len(points), np.int8)
    x, y = points.T
    for number, beyond in enumerate((x < 0, x > cells, y < 0, y > cells), start=1):
        side[beyond] = number
    return side


def _clip(start: Floats, end: Floats, cells: int) -> tuple[Floats, Floats, Flags]:
    """Edges cut at the square [0, cells]^2 (Liang and Barsky).

    Returns:
        the points where each edge enters and leaves (its own ends where they are inside), and whether it is inside at
        all.
    """
    step = end - start
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = -start / step, (cells - start) / step
    parallel = step == 0
    beside = parallel & ((start < 0) | (start > cells))
    low[parallel], high[parallel] = 0, 1
    near = np.minimum(low, high).max(1).clip(0, None)
    far = np.maximum(low, high).min(1).clip(None, 1)
    enter = (start + near[:, None] * step).clip(0, cells)  # clipped: rounding must not carry it outside
    leave = (start + far[:, None] * step).clip(0, cells)
    return enter, leave, (near <= far) & ~beside.any(1)
