"""The streets of a generated city: a grid of junctions, two lanes in each direction, walkways around every block.

The city is built in a local frame (junction (0, 0) at the origin, right-hand traffic), then mirrored where traffic
drives on the left, rotated and shifted into the first quadrant of nuScenes' map frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.synthetic.curves import Curve, transform_points

Array = NDArray[np.float64]
ToCity = Callable[[Array], Array]  # transforms points (N, 2) from a local frame to that of the city

GRID = 3  # junctions along each side
STUB = 70.0  # metres from an outer junction to the end of its road
CORNER = 15.0  # metres; kerbs and turning lanes are arcs about (+-CORNER, +-CORNER) of a junction
END = 20.5  # metres from the centre of a junction to the ends of its lanes
CROSSING = (15.5, 19.0)  # extent of a crossing along an arm, metres from the centre of the junction
STOP = (19.4, 20.1)  # extent of a stop line, as for CROSSING
MOVES = {"straight": 0, "left": 1, "right": 3}  # quarter turns to the left
CARPARK = (24.0, 60.0, 12.5)  # metres: start and end along the edge of the block, depth
BAY = 2.9  # metres along the edge for each parked car
DRIVEWAY = (40.0, 46.0)  # metres: start and end along the edge of the block
MARGIN = 80.0  # metres of open land around the streets


@dataclass(frozen=True)
class Layout:
    """How the streets of a location are laid out.

    Attributes:
        mirrored: whether traffic drives on the left.
        angle: of the grid, in radians.
        pitch: metres from junction to junction.
        lane: width of a lane in metres.
        walkway: width in metres.
    """

    mirrored: bool
    angle: float
    pitch: float = 100.0
    lane: float = 3.5
    walkway: float = 3.5

    @property
    def half(self) -> float:
        """Half the width of a road, in metres."""
        return 2 * self.lane

    @property
    def offsets(self) -> tuple[float, float]:
        """Metres from the centre line of a road to the inner and outer lane."""
        return self.lane / 2, 3 * self.lane / 2


LAYOUTS = {
    "boston-seaport": Layout(mirrored=False, angle=0.19),
    "singapore-onenorth": Layout(mirrored=True, angle=0.47),
    "singapore-hollandvillage": Layout(mirrored=False, angle=0.33, pitch=124.0, lane=3.0, walkway=5.0),
    "singapore-queenstown": Layout(mirrored=True, angle=0.08, pitch=124.0, lane=3.0, walkway=5.0),
}
# The locations of each town, in turn (setting synth.town).
TOWNS = {
    "first": ("boston-seaport", "singapore-onenorth"),
    "second": ("singapore-hollandvillage", "singapore-queenstown"),
}


@dataclass(frozen=True)
class Lane:
    """A lane of a road, or a connector through a junction."""

    name: str
    curve: Curve
    index: int  # 0 inner, 1 outer
    move: str = ""  # one of MOVES for a connector, empty for the lane of a road


@dataclass(frozen=True)
class Area:
    """A polygon of the map."""

    name: str
    rings: list[Array]  # (N, 2) each, the outer one first
    road: str = ""  # name of its road or junction


@dataclass
class City:
    """The streets of one location: lanes for traffic, areas and lines for the map expansion."""

    location: str
    lanes: dict[str, Lane] = field(default_factory=dict)
    connectors: dict[str, Lane] = field(default_factory=dict)
    outgoing: dict[str, list[str]] = field(default_factory=dict)  # names of the lanes that follow a lane
    areas: dict[str, list[Area]] = field(default_factory=dict)  # by layer
    lines: dict[str, list[tuple[str, Array, str]]] = field(default_factory=dict)  # by layer: name, points, road
    crossings: dict[str, Curve] = field(default_factory=dict)  # paths of pedestrians, by name of the crossing
    bays: list[Curve] = field(default_factory=list)  # one for each parked car

    @property
    def layout(self) -> Layout:
        """How its streets are laid out."""
        return LAYOUTS[self.location]

    def lane(self, name: str) -> Lane:
        """Find a lane or connector by name.

        Args:
            name: a key of ``lanes`` or ``connectors``.

        Returns:
            The lane or connector.
        """
        return self.lanes.get(name) or self.connectors[name]

    @property
    def size(self) -> tuple[float, float]:
        """Metres from the origin of the map to the far edges of the city, including the margin.

        Returns:
            Along x and along y.
        """
        rings = [ring for areas in self.areas.values() for area in areas for ring in area.rings]
        width, height = np.concatenate(rings).max(axis=0) + MARGIN
        return float(width), float(height)


@cache
def city(location: str) -> City:
    """Build the city of a nuScenes location, once in each process.

    Args:
        location: one of ``LAYOUTS``.

    Returns:
        The city in metres of the map frame, mirrored for left-hand traffic; equal arguments give the same object.
    """
    layout = LAYOUTS[location]
    mirror, angle = layout.mirrored, layout.angle
    plain = _streets(location)
    corners = transform_points(
        np.array(list(product((-STUB, (GRID - 1) * layout.pitch + STUB), repeat=2))), mirror, angle, (0, 0)
    )
    x, y = np.round(MARGIN - corners.min(axis=0), 1)
    placement = (mirror, angle, (float(x), float(y)))
    return City(
        location=location,
        lanes={k: Lane(k, v.curve.transformed(*placement), v.index, v.move) for k, v in plain.lanes.items()},
        connectors={k: Lane(k, v.curve.transformed(*placement), v.index, v.move) for k, v in plain.connectors.items()},
        outgoing=plain.outgoing,
        areas={
            layer: [
                Area(area.name, [transform_points(ring, *placement) for ring in area.rings], area.road)
                for area in areas
            ]
            for layer, areas in plain.areas.items()
        },
        lines={
            layer: [(name, transform_points(points, *placement), road) for name, points, road in lines]
            for layer, lines in plain.lines.items()
        },
        crossings={name: curve.transformed(*placement) for name, curve in plain.crossings.items()},
        bays=[curve.transformed(*placement) for curve in plain.bays],
    )


def _streets(location: str) -> City:
    streets = City(location)
    arriving: dict[tuple[int, int, int], list[str]] = {}  # junction i, j, arm: lanes that end there
    leaving: dict[tuple[int, int, int], list[str]] = {}
    for i, j, arm in product(range(GRID), range(GRID), range(4)):
        other = (i + (1, 0, -1, 0)[arm], j + (0, 1, 0, -1)[arm])
        inside = all(0 <= index < GRID for index in other)
        if inside and arm >= 2:
            continue  # the road is built from its other end
        forward, backward = _road(streets, i, j, arm, streets.layout.pitch - 2 * END if inside else STUB - END)
        leaving[i, j, arm], arriving[i, j, arm] = forward, backward
        if inside:
            arriving[*other, (arm + 2) % 4], leaving[*other, (arm + 2) % 4] = forward, backward
    for i, j in product(range(GRID), range(GRID)):
        _junction(streets, i, j, arriving, leaving)
    for i, j in product(range(-1, GRID), repeat=2):
        _block(streets, i, j)
    return streets


def _road(streets: City, i: int, j: int, arm: int, length: float) -> tuple[list[str], list[str]]:
    """Add the road that leaves junction (i, j) by an arm.

    Returns:
        Names of its lanes away from the junction, and towards it; inner lane first.
    """
    name = f"road-{i}-{j}-{arm}"
    layout = streets.layout
    to_map = _arm_frame(layout, i, j, arm)
    far = END + length
    rectangle = _rectangle(END, far, -layout.half, layout.half)
    _add_area(streets, "drivable_area", name, to_map, [rectangle], name)
    _add_area(streets, "road_segment", name, to_map, [rectangle], name)
    _add_line(streets, "road_divider", name, to_map, [(END, 0), (far, 0)], name)
    names: tuple[list[str], list[str]] = ([], [])
    for back, direction in enumerate(("out", "in")):
        side = 1 if back else -1  # right-hand traffic away from the junction is below the axis of the arm
        block = _rectangle(END, far, *sorted((0.0, side * layout.half)))
        _add_area(streets, "road_block", f"{name}-{direction}", to_map, [block], name)
        _add_line(
            streets,
            "lane_divider",
            f"{name}-{direction}",
            to_map,
            [(END, side * layout.lane), (far, side * layout.lane)],
            name,
        )
        for index, offset in enumerate(layout.offsets):
            lane = f"{name}-{direction}-{index}"
            x, y = to_map(np.array([[far if back else END, side * offset]]))[0]
            heading = np.pi / 2 * ((arm + 2 * back) % 4)
            streets.lanes[lane] = Lane(lane, Curve((float(x), float(y), heading), ((length, 0.0),)), index)
            streets.outgoing[lane] = []
            names[back].append(lane)
    return names


def _junction(
    streets: City,
    i: int,
    j: int,
    arriving: dict[tuple[int, int, int], list[str]],
    leaving: dict[tuple[int, int, int], list[str]],
) -> None:
    layout, name = streets.layout, f"junction-{i}-{j}"
    angles = np.linspace(1.5 * np.pi, np.pi, 9)  # the kerb around a corner, as seen from the centre of its arc
    kerb = CORNER + (CORNER - layout.half) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    quarter = np.concatenate([[[END, layout.half]], kerb, [[layout.half, END]]])
    outline = np.concatenate([_rotated(quarter, arm) for arm in range(4)])
    to_map = _arm_frame(layout, i, j, 0)
    _add_area(streets, "drivable_area", name, to_map, [outline], name)
    _add_area(streets, "road_segment", name, to_map, [outline], name)
    for arm in range(4):
        to_map = _arm_frame(layout, i, j, arm)
        crossing = f"{name}-{arm}"
        _add_area(streets, "ped_crossing", crossing, to_map, [_rectangle(*CROSSING, -layout.half, layout.half)], name)
        _add_area(streets, "stop_line", crossing, to_map, [_rectangle(*STOP, 0.0, layout.half)], name)
        x, y = to_map(np.array([[sum(CROSSING) / 2, -layout.half - layout.walkway / 2]]))[0]
        walk = Curve((float(x), float(y), np.pi / 2 * (arm + 1)), ((2 * layout.half + layout.walkway, 0.0),))
        streets.crossings[crossing] = walk
        for (move, quarters), index in product(MOVES.items(), range(2)):
            entry, leave = arriving[i, j, arm][index], leaving[i, j, (arm + 2 + quarters) % 4][index]
            connector = f"{name}-{arm}-{move}-{index}"
            curve = Curve(streets.lanes[entry].curve.end, _turn(move, layout.offsets[index]))
            streets.connectors[connector] = Lane(connector, curve, index, move)
            streets.outgoing[entry].append(connector)
            streets.outgoing[connector] = [leave]


def _turn(move: str, offset: float) -> tuple[tuple[float, float], ...]:
    if move == "straight":
        return ((2 * END, 0.0),)
    radius = CORNER + offset if move == "left" else CORNER - offset
    sign = 1.0 if move == "left" else -1.0
    return (END - CORNER, 0.0), (radius * np.pi / 2, sign / radius), (END - CORNER, 0.0)


def _block(streets: City, i: int, j: int) -> None:
    """Add the block between junctions (i, j) and (i + 1, j + 1): its walkway, and a car park on every other block."""
    layout, name = streets.layout, f"block-{i}-{j}"
    low = [-STUB if index < 0 else index * layout.pitch + layout.half for index in (i, j)]
    high = [
        (GRID - 1) * layout.pitch + STUB if index == GRID - 1 else (index + 1) * layout.pitch - layout.half
        for index in (i, j)
    ]
    rings = [
        _rounded(low[0] + inset, high[0] - inset, low[1] + inset, high[1] - inset, CORNER - layout.half - inset)
        for inset in (0.0, layout.walkway)
    ]
    _add_area(streets, "walkway", name, _identity, rings)
    if (i + j) % 2 or min(i, j) < 0 or max(i, j) == GRID - 1:
        return
    west, south = i * layout.pitch, j * layout.pitch + layout.half
    start, end, deep = CARPARK
    lot = _rectangle(west + start, west + end, south + layout.walkway, south + layout.walkway + deep)
    _add_area(streets, "carpark_area", name, _identity, [lot])
    driveway = _rectangle(west + DRIVEWAY[0], west + DRIVEWAY[1], south, south + layout.walkway)
    _add_area(streets, "drivable_area", f"{name}-driveway", _identity, [driveway])
    _add_area(streets, "drivable_area", f"{name}-lot", _identity, [lot])
    for bay in range(int((end - start) // BAY)):
        x = west + start + (bay + 0.5) * BAY
        streets.bays.append(Curve((x, south + layout.walkway + deep - 5.2, np.pi / 2), ((5.0, 0.0),)))


def _arm_frame(layout: Layout, i: int, j: int, arm: int) -> ToCity:
    """Return the transformation from the frame of an arm (x away from the junction) to that of the city."""

    def to_map(points: Array) -> Array:
        return _rotated(points, arm) + np.array([i * layout.pitch, j * layout.pitch])

    return to_map


def _identity(points: Array) -> Array:
    return points


def _rotated(points: Array, quarters: int) -> Array:
    x, y = points[:, 0], points[:, 1]
    return np.stack([(x, y), (-y, x), (-x, -y), (y, -x)][quarters % 4], axis=1)


def _rectangle(left: float, right: float, low: float, high: float) -> Array:
    return np.array([[left, low], [right, low], [right, high], [left, high]])


def _rounded(left: float, right: float, low: float, high: float, radius: float) -> Array:
    angles = np.linspace(0, np.pi / 2, 9)
    corners = [(right, high), (left, high), (left, low), (right, low)]
    rings = []
    for quarter, corner in enumerate(corners):
        sign = np.sign(np.array([left + right, low + high]) / 2 - corner)
        turn = angles + quarter * np.pi / 2
        rings.append(np.array(corner) + sign * radius + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1))
    return np.concatenate(rings)


def _add_area(streets: City, layer: str, name: str, to_map: ToCity, rings: list[Array], road: str = "") -> None:
    streets.areas.setdefault(layer, []).append(Area(name, [to_map(ring) for ring in rings], road))


def _add_line(
    streets: City, layer: str, name: str, to_map: ToCity, points: list[tuple[float, float]], road: str
) -> None:
    streets.lines.setdefault(layer, []).append((name, to_map(np.array(points, dtype=np.float64)), road))
