"""Buildings, trees and street lamps beside the roads of any map; they appear in pictures and lidar, but in no table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from magicdrive_core.synthetic.ground import MapLayers, read_layers

Array = NDArray[np.float64]

LAMP_PITCH, LAMP_SIZE, LAMP_OFFSET = (
    28.0,
    (0.24, 2.4, 7.5),
    0.9,
)  # metres: distance along the kerb; w, l, h; distance from the kerb
TREE_PITCH, TREE_OFFSET = 13.0, 2.6  # metres along the edge of free land, and into it
BUILDING_PITCH, BUILDING_OFFSET = 15.0, 6.5
CLEAR = 30.0  # metres between centres beyond which no two pieces of scenery touch
BUILDINGS = (  # mesh, width along the street, depth, lowest and highest height in metres
    ("house", 11.0, 9.0, (8.0, 11.0)),
    ("block", 13.0, 11.0, (14.0, 19.0)),
    ("office", 14.0, 12.0, (20.0, 28.0)),
)


@dataclass(frozen=True)
class Scenery:
    """N pieces of scenery on the ground."""

    names: list[str]  # of meshes.mesh_of
    boxes: Array  # (N, 7): x, y, height of the bottom above ground, w, l, h in metres, heading in radians


@cache
def load_scenery(root: Path, location: str) -> Scenery:
    """Place the scenery of a map of a data root, once in each process.

    Args:
        root: the data root.
        location: name of the map, such as "singapore-onenorth".

    Returns:
        The scenery, see ``place_scenery``.

    Raises:
        MagicDriveError: the map is missing or damaged.
    """
    return place_scenery(read_layers(root, location))


def place_scenery(layers: MapLayers) -> Scenery:
    """Place street lamps at the kerbs, and buildings and trees on free land, all facing the road.

    Args:
        layers: the layers of the map.

    Returns:
        The scenery, which depends only on the map; footprints do not touch.
    """
    road = _union(layers, ("drivable_area",))
    paved = _union(layers, ("drivable_area", "walkway", "ped_crossing", "carpark_area"))
    shapely.prepare([road, paved])
    names: list[str] = []
    boxes: list[tuple[float, ...]] = []
    taken: list[tuple[Polygon, float, float]] = []

    def stand(name: str, middle: Array, inward: Array, size: tuple[float, float, float], foot: Polygon) -> None:
        keep_off = road if name == "street_lamp" else paved
        if shapely.intersects(keep_off, foot):
            return
        x, y = middle.tolist()
        close = [other for other, u, v in taken if abs(u - x) < CLEAR and abs(v - y) < CLEAR]
        if any(shapely.dwithin(other, foot, 0.4) for other in close):
            return
        taken.append((foot, x, y))
        names.append(name)
        heading = float(np.arctan2(inward[1], inward[0]))
        boxes.append((*np.round(middle, 3), 0.0, *size, round(heading, 5)))

    for point, inward in _edge(road, LAMP_PITCH, 7.0):
        pole = point - inward * LAMP_OFFSET
        middle = pole + inward * LAMP_SIZE[1] * 0.47  # the pole stands at the back of the lamp's box
        stand("street_lamp", middle, inward, LAMP_SIZE, _rectangle(pole, inward, 0.3, 0.3))
    for point, inward in _edge(paved, BUILDING_PITCH, 4.0):
        chance = _chance(point)
        name, wide, deep, (low, high) = BUILDINGS[int(chance[0] * len(BUILDINGS))]
        middle = point - inward * (BUILDING_OFFSET + deep / 2)
        foot = _rectangle(middle, inward, wide, deep)
        stand(name, middle, inward, (wide, deep, round(low + (high - low) * chance[1], 1)), foot.buffer(3.0))
    for point, inward in _edge(paved, TREE_PITCH, 1.0):
        chance = _chance(point)
        crown, height = round(3.4 + 1.6 * chance[0], 1), round(5.2 + 2.8 * chance[1], 1)
        middle = point - inward * TREE_OFFSET
        stand("tree", middle, inward, (crown, crown, height), _rectangle(middle, inward, crown, crown))
    return Scenery(names, np.array(boxes).reshape(-1, 7))


def _union(layers: MapLayers, names: tuple[str, ...]) -> BaseGeometry:
    polygons = [Polygon(rings[0], rings[1:]) for name in names for rings in layers.polygons[name] if len(rings[0]) > 2]
    # Two centimetres close the seams between neighbouring areas.
    return shapely.union_all([shapely.make_valid(polygon).buffer(0.02) for polygon in polygons])


def _edge(area: BaseGeometry, pitch: float, start: float) -> Iterator[tuple[Array, Array]]:
    """Yield points along the outlines of an area, each with the unit vector into the area."""
    parts = area.geoms if isinstance(area, MultiPolygon) else [area]
    for part in sorted(parts, key=lambda part: tuple(np.round(part.bounds, 2))):
        if not isinstance(part, Polygon) or part.is_empty:
            continue
        part = shapely.geometry.polygon.orient(part)  # the area is left of its outline
        rings = sorted((part.exterior, *part.interiors), key=lambda ring: tuple(np.round(ring.bounds, 2)))
        for ring in rings:
            for distance in np.arange(start, ring.length, pitch):
                point, ahead = (np.array(ring.interpolate(d).coords[0]) for d in (distance, distance + 0.5))
                step = ahead - point
                length = float(np.hypot(*step))
                if length > 0.1:
                    yield point, np.array([-step[1], step[0]]) / length


def _rectangle(middle: Array, ahead: Array, width: float, length: float) -> Polygon:
    ahead = ahead * length / 2
    left = np.array([-ahead[1], ahead[0]]) * width / length
    return Polygon([middle + ahead + left, middle - ahead + left, middle - ahead - left, middle + ahead - left])


def _chance(point: Array) -> tuple[float, float]:
    """Hash a position to two numbers in [0, 1)."""
    x, y = (round(float(value), 1) + 0.0 for value in point)
    digest = hashlib.md5(f"{x:.1f} {y:.1f}".encode(), usedforsecurity=False).digest()
    return digest[0] / 256, digest[1] / 256
