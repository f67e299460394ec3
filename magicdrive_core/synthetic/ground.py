"""Paint the ground: the areas, zebra stripes, lane dashes and kerbs of a map, as one label for each pixel."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import MAP_LAYERS
from magicdrive_core.data.vector_maps import LINE_LAYERS, VectorMap, load_map
from magicdrive_core.synthetic.camera import SHIFT, Pixels, PosedCamera

Array = NDArray[np.float64]
Labels = NDArray[np.uint8]  # (900, 1600), a Label and possibly the SHADOW flag for each pixel

MAP_RANGE = 110.0  # metres from the camera within which the map is drawn
MARK_RANGE = 60.0  # metres from the camera within which markings are drawn
FORWARD = np.array([0.0, 0.0, 1.0])  # in the camera frame
SHADOW = 0x80  # flag added to a label


@dataclass(frozen=True)
class MapLayers:
    """The eight map layers of the conditions, in metres of the global frame."""

    polygons: dict[str, list[list[Array]]]  # by layer: rings (K, 2) of each polygon, the outer one first
    lines: dict[str, list[Array]]  # by layer: points (K, 2) of each line


def read_layers(root: Path, location: str) -> MapLayers:
    """Read ``maps/expansion/<location>.json`` below a data root.

    Args:
        root: the data root.
        location: name of the map, such as "singapore-onenorth".

    Returns:
        The layers; those that the file lacks are empty.

    Raises:
        MagicDriveError: the file is missing, damaged, or of another version than 1.3.
    """
    return layers_of(load_map(root, location))


def layers_of(vector_map: VectorMap) -> MapLayers:
    """Group the paths of a vector map by layer, polygons with their holes.

    Args:
        vector_map: the map.

    Returns:
        The layers, all eight of ``MAP_LAYERS``; their arrays are views of the map's vertices.
    """
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
    return MapLayers(polygons, lines)


class Label(IntEnum):
    """The surface that a pixel of ground or sky shows."""

    SKY = 0
    CLOUD = 1
    CLOUD_SHADE = 2
    FAR = 3
    TREES = 4
    LAND = 5
    WALKWAY = 6
    ROAD = 7
    ROAD_BLOCK = 8
    CARPARK = 9
    CROSSING = 10
    STOP_LINE = 11
    ROAD_DIVIDER = 12
    LANE_DIVIDER = 13
    KERB = 14


WET = (Label.ROAD, Label.ROAD_BLOCK, Label.CARPARK)  # surfaces that mirror the scene in rain
AREAS = (  # painted in this order
    ("walkway", Label.WALKWAY),
    ("drivable_area", Label.ROAD),
    ("road_block", Label.ROAD_BLOCK),
    ("carpark_area", Label.CARPARK),
    ("stop_line", Label.STOP_LINE),
)
STRIPE = 0.5  # width of zebra stripes and of the gaps between them, metres
LINE = 0.16  # width of painted lines, metres
DASH, PAUSE = 3.0, 3.0  # lengths of dashes and gaps of lane dividers, metres
DOUBLE = 0.16  # metres from the middle of a road divider to each of its two lines
KERB = 0.18  # width in metres


@dataclass(frozen=True)
class Ground:
    """A map, prepared for painting: R rings of areas and M markings."""

    points: Array  # (P, 2) vertices of all rings
    starts: NDArray[np.int64]  # (R,) index of the first vertex of each ring, in painting order
    areas: NDArray[np.int64]  # (R,) index of the area of each ring
    labels: NDArray[np.int64]  # (R,) Label of each ring
    centres: Array  # (R, 2) centres of circles around the rings
    radii: Array  # (R,) radii of these circles
    marks: Array  # (M, 4, 2) quadrilaterals in painting order
    mark_labels: NDArray[np.int64]  # (M,) Label of each marking


def prepare(layers: MapLayers) -> Ground:
    """Prepare a map: cut its crossings, lines and walkways into stripes, dashes and kerbs.

    Args:
        layers: the layers of the map, in metres of the global frame.

    Returns:
        The rings of areas and the markings, in painting order.
    """
    areas = [(label, rings) for layer, label in AREAS for rings in layers.polygons[layer]]
    outlines = [(area, label, ring) for area, (label, rings) in enumerate(areas) for ring in rings]
    boxes = [(ring.min(axis=0), ring.max(axis=0)) for _, _, ring in outlines]
    marks: list[tuple[Label, Array]] = []
    for rings in layers.polygons["walkway"]:
        marks += [(Label.KERB, _strip(np.concatenate([ring, ring[:1]]), KERB)) for ring in rings[:1]]
    marks += [(Label.CROSSING, _stripes(rings[0])) for rings in layers.polygons["ped_crossing"]]
    marks += [(Label.LANE_DIVIDER, _dashes(line)) for line in layers.lines["lane_divider"]]
    for line in layers.lines["road_divider"]:
        marks += [(Label.ROAD_DIVIDER, _strip(line, LINE, offset)) for offset in (-DOUBLE, DOUBLE)]
    marks = [(label, quads) for label, quads in marks if len(quads)]
    return Ground(
        points=np.concatenate([np.empty((0, 2)), *(ring for _, _, ring in outlines)]),
        starts=np.cumsum([0, *(len(ring) for _, _, ring in outlines)])[:-1],
        areas=np.array([area for area, _, _ in outlines], dtype=np.int64),
        labels=np.array([label for _, label, _ in outlines], dtype=np.int64),
        centres=np.array([(low + high) / 2 for low, high in boxes]).reshape(-1, 2),
        radii=np.array([np.linalg.norm(high - low) / 2 for low, high in boxes]),
        marks=np.concatenate([quads for _, quads in marks]) if marks else np.empty((0, 4, 2)),
        mark_labels=np.array([label for label, quads in marks for _ in quads], dtype=np.int64),
    )


def paint(labels: Labels, ground: Ground, camera: PosedCamera) -> None:
    """Paint the land and the map into labels, in place.

    Args:
        labels: (900, 1600) labels with the sky already painted.
        ground: the map; areas beyond ``MAP_RANGE`` and markings beyond ``MARK_RANGE`` are left out.
        camera: the camera.
    """
    x, y = camera.eye[:2]
    far = 4000.0
    land = np.array([[x - far, y - far], [x + far, y - far], [x + far, y + far], [x - far, y + far]])
    cv2.fillPoly(labels, [camera.outline(camera.from_ground(land))], (int(Label.LAND),), shift=SHIFT)
    if len(ground.starts):
        _paint_areas(labels, ground, camera)
    close = np.flatnonzero(np.linalg.norm(ground.marks[:, 0] - camera.eye[:2], axis=1) < MARK_RANGE)
    for index, outline in zip(close, camera.outlines(camera.from_ground(ground.marks[close]), 0.7), strict=True):
        if outline is not None:
            cv2.fillPoly(labels, [outline], (int(ground.mark_labels[index]),), shift=SHIFT)


def _paint_areas(labels: Labels, ground: Ground, camera: PosedCamera) -> None:
    points = camera.from_ground(ground.points)
    seen = np.linalg.norm(ground.centres - camera.eye[:2], axis=1) - ground.radii < MAP_RANGE
    for inward in (FORWARD, *camera.sides):
        seen &= np.maximum.reduceat(points @ inward, ground.starts) > 0
    outlines: dict[int, list[Pixels]] = {}
    ends = [*ground.starts[1:], len(points)]
    for ring in np.flatnonzero(seen):
        outline = camera.outline(points[ground.starts[ring] : ends[ring]])
        if len(outline):
            outlines.setdefault(int(ground.areas[ring]), []).append(outline)
    label_of = dict(zip(ground.areas.tolist(), ground.labels.tolist(), strict=True))
    for area, rings in outlines.items():
        cv2.fillPoly(labels, rings, (label_of[area],), shift=SHIFT)


def shade(labels: Labels, quads: Array, camera: PosedCamera) -> None:
    """Add the SHADOW flag where quadrilaterals cover the ground, in place.

    Args:
        labels: (900, 1600) labels of sky and ground; the sky takes no shadow.
        quads: (N, 4, 2) shadows in metres of the global frame, on the ground plane.
        camera: the camera.
    """
    shadow = np.zeros_like(labels)
    for outline in camera.outlines(camera.from_ground(quads), 2.0):
        if outline is not None:
            cv2.fillConvexPoly(shadow, outline, (SHADOW,), shift=SHIFT)
    shadow[labels < Label.LAND] = 0
    cv2.bitwise_or(labels, shadow, dst=labels)


def _strip(line: Array, width: float, offset: float = 0.0) -> Array:
    """Widen each piece of a line, ``offset`` metres to its right, to a quadrilateral (4, 2)."""
    step = np.diff(line, axis=0)
    length = np.linalg.norm(step, axis=1)
    keep = length > 1e-6
    start, step = line[:-1][keep], step[keep]
    right = np.stack([step[:, 1], -step[:, 0]], axis=1) / length[keep, None]
    near, far = right * (offset - width / 2), right * (offset + width / 2)
    return np.stack([start + near, start + step + near, start + step + far, start + far], axis=1)


def _dashes(line: Array) -> Array:
    """Cut a line into dashes: quadrilaterals (Q, 4, 2)."""
    reach = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    starts = np.arange(0.0, reach[-1], DASH + PAUSE)
    quads = []
    for start in starts:
        end = min(start + DASH, reach[-1])
        inner = reach[(reach > start) & (reach < end)]
        at = np.concatenate([[start], inner, [end]])
        quads.append(_strip(np.stack([np.interp(at, reach, line[:, axis]) for axis in (0, 1)], axis=1), LINE))
    return np.concatenate(quads) if quads else np.empty((0, 4, 2))


def _stripes(ring: Array) -> Array:
    """Cut a crossing into zebra stripes (Q, 4, 2) across its longer side, each as long as the outline is there."""
    step = np.roll(ring, -1, axis=0) - ring
    along = step[np.argmax(np.round(np.linalg.norm(step, axis=1), 6))]
    along = along / np.linalg.norm(along)
    across = np.array([-along[1], along[0]])
    u, v = ring @ along, ring @ across
    quads = []
    for start in np.arange(u.min() + STRIPE / 2, u.max() - STRIPE, 2 * STRIPE):
        near, far = _span(u, v, start), _span(u, v, start + STRIPE)
        if near and far:
            points = [(start, near[0]), (start + STRIPE, far[0]), (start + STRIPE, far[1]), (start, near[1])]
            quads.append([p * along + q * across for p, q in points])
    return np.array(quads).reshape(-1, 4, 2)


def _span(u: Array, v: Array, position: float) -> tuple[float, float] | None:
    """Return the extent in v of an outline at u = position."""
    after_u, after_v = np.roll(u, -1), np.roll(v, -1)
    crosses = (u < position) != (after_u < position)
    if crosses.sum() < 2:
        return None
    share = (position - u[crosses]) / (after_u[crosses] - u[crosses])
    at = v[crosses] + share * (after_v[crosses] - v[crosses])
    return float(at.min()), float(at.max())
