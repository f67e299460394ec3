"""BEV maps: the eight map layers around the lidar, rasterised as by the devkit's ``get_map_mask``.

A map covers 100 m x 100 m, centred on the lidar and rotated by the heading of the lidar's x axis. Bit c of a cell is
layer c of ``MAP_LAYERS``; index [i, j] is i along the lidar's x and j along its y. Polygons are filled including their
outlines, holes are cleared, lines are two cells thick. A hole that leaves the patch keeps its rim filled: the devkit
cuts polygons at the patch before drawing, and the rim is then part of the outline.

The devkit cuts each polygon with shapely, frame by frame. Here the paths near many frames are transformed in one NumPy
pass to *pieces* ready for OpenCV, and shapely cuts only lines that cross the border of a patch.

F frames, P pairs of a frame and a path near it, n vertices in total. Vertices are in cells: x and y along the axes of
the lidar, (0, 0) at the corner of the patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from magicdrive_core.data.records import MAP_EXTENT, MAP_LAYERS
from magicdrive_core.data.vector_maps import LINE_LAYERS, VectorMap

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Bits = NDArray[np.uint8]

_BLOCK = 64  # frames that are prepared in one pass: enough to be fast, few enough to use little memory

HALF = MAP_EXTENT / 2
_LOCAL_PATCH = shapely.box(-HALF, -HALF, HALF, HALF)
_IS_LINE = np.array([name in LINE_LAYERS for name in MAP_LAYERS])


def rasterise(vectors: VectorMap, lidar_to_global: Floats, cells: int) -> Bits:
    """Rasterise the BEV maps of frames.

    Args:
        vectors: the map of the scene's location.
        lidar_to_global: (F, 4, 4) poses of the lidar.
        cells: cells along each side of a map.

    Returns:
        (F, cells, cells); bit c of a cell is layer c of ``MAP_LAYERS``.
    """
    out = np.zeros((len(lidar_to_global), cells, cells), np.uint8)
    # One column of margin: fillPoly draws what is beyond the left border of its canvas onto the border (OpenCV 4.11).
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
    """Draw one frame: each layer on its own canvas (cells, cells + 1), then all layers combined into ``out``."""
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
    """Unpack the bits of BEV maps into layers.

    Args:
        bits: (..., h, w) maps; bit c of a cell is layer c of ``MAP_LAYERS``.

    Returns:
        (..., 8, h, w) of 0 and 1, in the order of ``MAP_LAYERS``.
    """
    layers = [(bits >> layer) & 1 for layer in range(len(MAP_LAYERS))]
    return np.stack(layers, axis=-3)


@dataclass(frozen=True)
class Pieces:
    """P pieces to draw, ordered by frame and then in drawing order."""

    vertices: NDArray[np.int32]  # n, 2 cells
    ends: Ints  # P + 1: piece p has the vertices ends[p] to ends[p + 1]
    frames: Ints  # P
    layers: Ints  # P
    holes: Flags  # P
    cut: Flags  # P: whether part of the path is beyond the patch


@dataclass(frozen=True)
class _Pairs:
    """The P pairs of a frame and a path near its patch, with the path's vertices in cells."""

    frames: Ints  # P
    paths: Ints  # P
    counts: Ints  # P: vertices of the path, at least 1
    rows: Ints  # n: index of each vertex in the map
    points: Floats  # n, 2
    side: NDArray[np.int8]  # n: which side of the patch a vertex is beyond, 0 none

    @classmethod
    def near(cls, vectors: VectorMap, centres: Floats, headings: Floats, wanted: Flags, cells: int) -> _Pairs:
        """Pair each frame with the paths whose bounds come near its patch, and transform them to cells.

        Args:
            vectors: the map, with R paths.
            centres: (F, 2) centres of the patches, metres in the global frame.
            headings: (F,) headings of their x axes in radians.
            wanted: (R,) paths to consider.
            cells: cells along each side of a patch.

        Returns:
            The pairs, ordered by frame and then by path.
        """
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
    """Prepare the rings near each frame so that filling them equals, inside the patch, filling rings cut at the patch.

    Args:
        vectors: the map.
        centres: (F, 2) centres of the patches, metres in the global frame.
        headings: (F,) headings of their x axes in radians.
        cells: cells along each side of a patch.

    Returns:
        One piece for each ring near a frame, with vertices rounded to the nearest cell; a ring that does not reach the
        patch may have no vertices.
    """
    pairs = _Pairs.near(vectors, centres, headings, ~_IS_LINE[vectors.layers], cells)
    before, following = _neighbours(pairs.counts)
    # A vertex between two others beyond the same side of the patch changes nothing inside it. That drops most vertices.
    side = pairs.side
    needed = (side == 0) | (side != side[before]) | (side != side[following])
    counts = _sum_by_path(needed, pairs.counts)
    points, side = pairs.points[needed], side[needed]
    _, following = _neighbours(counts)
    # Each vertex is followed by the points where its edge enters and leaves the patch, so that the edge covers the same
    # cells as one that was cut there. Outer vertices are then moved further out, where rounding cannot bring them in.
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
    """Cut lines to the parts inside the patch of each frame.

    Args:
        vectors: the map.
        centres: (F, 2) centres of the patches, metres in the global frame.
        headings: (F,) headings of their x axes in radians.
        cells: cells along each side of a patch.

    Returns:
        One piece for each part of a line inside a patch, with vertices cut off to whole cells as in the devkit.
    """
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
    """Cut the lines of some pairs at the patch.

    The steps and their rounding are the devkit's: an end that was cut is exactly on the border, so the last bit of its
    position decides the cell, and with it where a straight line across the patch changes rows.

    Returns:
        Vertices in metres about the centre of the patch, number of vertices of each part, and the pair of each part.
    """
    frames = pairs.frames[which]
    square = HALF * np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]])
    patches = shapely.polygons(_rotated(centres[:, None] + square, headings[:, None], centres[:, None]))
    chosen = np.isin(np.repeat(np.arange(len(pairs.paths)), pairs.counts), which)
    lines = shapely.linestrings(
        vectors.points[pairs.rows[chosen]], indices=np.repeat(np.arange(len(which)), pairs.counts[which])
    )
    lines, owner = _parts(shapely.intersection(lines, patches[frames]))
    which, frames = which[owner], frames[owner]
    points, line = shapely.get_coordinates(lines, return_index=True)
    about = centres[frames[line]]
    local = _rotated(points, -headings[frames[line]], about) - about
    lines, owner = _parts(shapely.intersection(shapely.linestrings(local, indices=line), _LOCAL_PATCH))
    return shapely.get_coordinates(lines), shapely.get_num_coordinates(lines).astype(np.int64), which[owner]


def _parts(geometries: NDArray[np.object_]) -> tuple[NDArray[np.object_], Ints]:
    """Collect the lines among the parts of geometries, and the index of the geometry that each comes from."""
    parts, owners = shapely.get_parts(geometries, return_index=True)
    lines = (shapely.get_type_id(parts) == shapely.GeometryType.LINESTRING) & ~shapely.is_empty(parts)
    return parts[lines], owners[lines]


def _rotated(points: Floats, angle: Floats, origin: Floats) -> Floats:
    """Rotate points (..., 2) about ``origin`` in the order of operations of ``shapely.affinity.rotate``."""
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y, x_0, y_0 = points[..., 0], points[..., 1], origin[..., 0], origin[..., 1]
    rotated_x = cosine * x - sine * y + (x_0 - x_0 * cosine + y_0 * sine)
    rotated_y = sine * x + cosine * y + (y_0 - x_0 * sine - y_0 * cosine)
    return np.stack([rotated_x, rotated_y], axis=-1)


def _neighbours(counts: Ints) -> tuple[Ints, Ints]:
    """Find the vertices before and after every vertex of closed rings with ``counts`` vertices each."""
    index = np.arange(counts.sum())
    end, full = np.cumsum(counts), counts > 0
    first, last = (end - counts)[full], end[full] - 1
    before, following = index - 1, index + 1
    before[first], following[last] = last, first
    return before, following


def _sum_by_path(values: NDArray[np.generic], counts: Ints) -> Ints:
    """Sum values over the vertices of each path."""
    sums = np.append(0, np.cumsum(values, dtype=np.int64))
    end = np.cumsum(counts)
    return sums[end] - sums[end - counts]


def _side_beyond(points: Floats, cells: int) -> NDArray[np.int8]:
    """Number the side of the patch that each point is beyond: 0 none, 1 to 4 (the highest where two apply)."""
    side: NDArray[np.int8] = np.zeros(len(points), np.int8)
    x, y = points.T
    for number, beyond in enumerate((x < 0, x > cells, y < 0, y > cells), start=1):
        side[beyond] = number
    return side


def _clip(start: Floats, end: Floats, cells: int) -> tuple[Floats, Floats, Flags]:
    """Clip edges at the square [0, cells]^2 (Liang and Barsky).

    Returns:
        The points where each edge enters and leaves the square (its own end where that is inside), and whether any of
        it is inside.
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
