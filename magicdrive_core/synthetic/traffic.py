"""Plan generated scenes: location, light, ego trajectory, traffic without collisions, and the description.

The same settings and scene index give the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config.schema import Synth
from magicdrive_core.synthetic.city import TOWNS, City, Lane, Layout, city
from magicdrive_core.synthetic.curves import Curve
from magicdrive_core.synthetic.rig import KEY_PERIOD

Array = NDArray[np.float64]

# Width, length and height in metres, close to the means of nuScenes.
SIZES = {
    "vehicle.car": (1.92, 4.6, 1.7),
    "vehicle.truck": (2.5, 7.2, 3.0),
    "vehicle.construction": (2.7, 6.2, 3.2),
    "vehicle.bus.rigid": (2.9, 11.0, 3.5),
    "vehicle.trailer": (2.6, 9.0, 3.6),
    "vehicle.motorcycle": (0.8, 2.1, 1.6),
    "vehicle.bicycle": (0.65, 1.75, 1.7),
    "human.pedestrian.adult": (0.66, 0.7, 1.75),
    "movable_object.trafficcone": (0.42, 0.42, 0.85),
    "movable_object.barrier": (2.4, 0.55, 1.0),
}
SMALL = 0.88  # scale of the second town's cars
REACH = 50.0  # metres from the ego trajectory within which traffic starts
CHECKS = 4.0  # collision checks for each second of a scene
GAP = 0.35  # smallest distance between two objects in metres
TRIES = 120  # attempts to add an object
EGO_LENGTH, EGO_WIDTH, EGO_AHEAD = 4.9, 2.0, 1.4  # metres; EGO_AHEAD: from the rear axle to the centre

LIGHTS = ("day", "night", "rain")
EGO_MOVES = ("straight", "left", "right")
SPEEDS = {"straight": (7.0, 9.5), "left": (5.2, 6.2), "right": (5.0, 5.5)}  # m/s, lowest and highest
WORDS = {
    "straight": ("go straight across the intersection", "drive along a wide street", "cross the intersection"),
    "left": ("turn left at the intersection", "wide left turn"),
    "right": ("turn right at the intersection", "tight right turn"),
}
PREFIX = {"day": "", "night": "Night, ", "rain": "Rain, "}
FAR, NEAR = 25.0, 3.0  # metres before the junction at which scenes of one frame are: its markings are visible
SPREAD = (-20.0, 30.0)  # metres before the junction at which drives start, least and most, with spread starts
FIRST_TIME = 1_700_000_000_000_000  # microseconds: the first scene's first key frame
SCENE_PITCH = 60_000_000  # microseconds from scene to scene


@dataclass(frozen=True)
class ScenePlan:
    """Everything that happens in a scene.

    The ego car follows ``route`` at constant speed. ``location`` is one of ``city.LAYOUTS``, ``light`` one of
    ``LIGHTS``.
    """

    index: int
    name: str
    location: str
    light: str
    description: str
    first_time: int  # time of the first key frame in microseconds
    key_frames: int
    route: Curve
    start: float  # metres along the route at the first key frame
    speed: float  # m/s
    traffic: Traffic

    def ego_poses(self, times: Array) -> Array:
        """Compute poses of the ego car (its rear axle).

        Args:
            times: (N,) microseconds, also before the first or after the last key frame.

        Returns:
            (N, 3) x, y in metres of the map frame and heading in radians.
        """
        return self.route.poses(self.start + self.speed * (times - self.first_time) / 1e6)


def plan_scene(synth: Synth, index: int) -> ScenePlan:
    """Plan one scene.

    Args:
        synth: the settings of the data.
        index: index of the scene, from 0; it chooses location, light and turn, and seeds the rest.

    Returns:
        The plan; equal arguments give equal plans.
    """
    rng = np.random.default_rng([synth.seed, index])
    light = LIGHTS[index % len(LIGHTS)]
    locations = TOWNS[synth.town]
    location = locations[index % len(locations)]
    move = EGO_MOVES[(index + index // len(EGO_MOVES)) % len(EGO_MOVES)]
    speed = float(rng.uniform(*SPEEDS[move]))
    key_frames = int(synth.seconds * 1e6 / KEY_PERIOD + 1e-6) + 1
    seconds = (key_frames - 1) * KEY_PERIOD / 1e6
    streets = city(location)
    route, turn_at = _plan_route(streets, move, speed * seconds, rng)
    start = max(6.0, turn_at - 0.45 * speed * seconds - 4.0)
    if key_frames == 1:  # one frame of such a drive, at a random distance from the junction
        start = turn_at - float(rng.uniform(NEAR, FAR))
    elif synth.starts == "spread":
        start = turn_at - float(rng.uniform(*SPREAD))
    traffic = populate(streets, route, start, speed, seconds, rng)
    if synth.town == "second":  # after the checks for collisions: what shrinks touches nothing
        traffic.actors = [
            replace(actor, scale=SMALL) if actor.category == "vehicle.car" else actor for actor in traffic.actors
        ]
    words = [WORDS[move][rng.integers(len(WORDS[move]))], *_sights(traffic, rng)]
    text = PREFIX[light] + ", ".join(words)
    return ScenePlan(
        index=index,
        name=f"scene-{2001 + index}",
        location=location,
        light=light,
        description=text[0].upper() + text[1:],
        first_time=FIRST_TIME + index * SCENE_PITCH,
        key_frames=key_frames,
        route=route,
        start=start,
        speed=speed,
        traffic=traffic,
    )


def _plan_route(streets: City, move: str, distance: float, rng: np.random.Generator) -> tuple[Curve, float]:
    """Plan a route that takes its first junction by ``move``.

    Turns start from the lane that allows them: the inner one to the left, the outer one to the right. Routes that end
    before the scene does are left out.

    Args:
        streets: the city.
        move: "straight", "left" or "right".
        distance: length of the drive in metres.
        rng: source of randomness.

    Returns:
        The route, and the distance along it at which the junction starts.
    """
    mirrored = streets.layout.mirrored
    cars_move = {"left": "right", "right": "left"}.get(move, move) if mirrored else move  # before mirroring
    index = {"straight": int(rng.integers(2)), "left": 0, "right": 1}[cars_move]
    starts = [lane.name for lane in streets.lanes.values() if lane.index == index and lane.curve.length > 50]
    needed = distance + 70.0
    for candidate in rng.permutation(len(starts)):
        first = starts[candidate]
        for connector in streets.outgoing[first]:
            if streets.connectors[connector].move != cars_move:
                continue
            rest = _onward(streets, streets.outgoing[connector][0], needed)
            if rest is not None:
                curve = streets.lanes[first].curve
                turn_at = curve.length
                for name in (connector, *rest):
                    curve = curve.joined(streets.lane(name).curve)
                return curve, turn_at
    raise AssertionError("the city has no such route")


def _onward(streets: City, name: str, needed: float) -> list[str] | None:
    """Find lanes from ``name`` on with a total length of at least ``needed`` metres; None at a dead end."""
    length = streets.lane(name).curve.length
    if length >= needed:
        return [name]
    for successor in streets.outgoing[name]:
        rest = _onward(streets, successor, needed - length)
        if rest is not None:
            return [name, *rest]
    return None


def _sights(traffic: Traffic, rng: np.random.Generator) -> list[str]:
    """Describe up to three kinds of objects of the scene in words."""
    words = {
        "vehicle.construction": "road works with cones",
        "vehicle.bus.rigid": "bus",
        "vehicle.trailer": "truck with trailer",
        "vehicle.motorcycle": "motorcycle",
        "vehicle.bicycle": "cyclists",
        "human.pedestrian.adult": "people on the walkway",
    }
    present = {actor.category for actor in traffic.actors}
    sights = [word for category, word in words.items() if category in present]
    if any(actor.attribute == "vehicle.parked" for actor in traffic.actors):
        sights.append("parked cars")
    chosen = sorted(rng.permutation(len(sights))[:3])
    return [sights[index] for index in chosen]


@dataclass(frozen=True)
class Actor:
    """An object that follows a curve at constant speed.

    ``category`` is a key of ``SIZES``, ``attribute`` a nuScenes attribute, empty for objects that have none.
    """

    category: str
    attribute: str
    curve: Curve
    start: float  # metres along the curve at time 0
    speed: float = 0.0  # m/s
    offset: float = 0.0  # metres right of the curve
    turn: float = 0.0  # radians from the direction of travel to the heading
    scale: float = 1.0  # of the usual size

    @property
    def size(self) -> tuple[float, float, float]:
        """Width, length, height in metres."""
        width, length, height = SIZES[self.category]
        return self.scale * width, self.scale * length, self.scale * height

    def poses(self, seconds: Array) -> Array:
        """Compute the centre and heading of the object.

        Args:
            seconds: (N,) times from the start of the scene.

        Returns:
            (N, 3) x, y in metres of the map frame and heading in radians.
        """
        poses = self.curve.poses(self.start + self.speed * seconds, self.offset)
        poses[:, 2] += self.turn
        return poses


@dataclass
class Traffic:
    """The actors of a scene, none of which ever touch."""

    seconds: Array  # (T,) times of collision checks
    ego_path: Array  # (W, 2) points on the ego trajectory
    actors: list[Actor] = field(default_factory=list)
    _discs: list[tuple[Array, float]] = field(default_factory=list)  # (T, D, 2) centres, radius

    def occupy(self, poses: Array, length: float, width: float) -> None:
        """Keep the area of a moving rectangle free.

        Args:
            poses: (T, 3) x, y in metres and heading in radians of its centre, at the times ``seconds``.
            length: length of the rectangle in metres.
            width: width of the rectangle in metres.
        """
        self._discs.append(_discs(poses, length, width))

    def add(self, actors: Iterable[Actor]) -> bool:
        """Add actors, all or none.

        Args:
            actors: at least one actor; they are not checked against each other.

        Returns:
            Whether they were added: the first starts near the ego trajectory, and none touches an actor that was there
            before.
        """
        actors = list(actors)
        if _distance(actors[0].poses(np.zeros(1))[:, :2], self.ego_path) > REACH:
            return False
        covered = [_discs(actor.poses(self.seconds), actor.size[1], actor.size[0]) for actor in actors]
        if any(_touch(new, old) for new in covered for old in self._discs):
            return False
        self._discs += covered
        self.actors += actors
        return True


def populate(
    city: City, ego: Curve, ego_start: float, speed: float, seconds: float, rng: np.random.Generator
) -> Traffic:
    """Fill a scene with traffic of all ten detection classes around the ego trajectory.

    Args:
        city: the streets.
        ego: the route of the ego car.
        ego_start: start of its rear axle, metres along the route.
        speed: speed of the ego car in m/s.
        seconds: length of the scene.
        rng: source of randomness of the scene.

    Returns:
        The traffic; a kind of object that finds no free position is missing.
    """
    checks = np.linspace(-0.1, seconds + 0.1, int(np.ceil(CHECKS * seconds)) + 1)
    ego_path = ego.poses(np.linspace(ego_start, ego_start + speed * seconds, 9))[:, :2]
    traffic = Traffic(checks, ego_path)
    traffic.occupy(ego.poses(ego_start + EGO_AHEAD + speed * checks), EGO_LENGTH, EGO_WIDTH)
    near = _near_lanes(city, ego_path)

    ahead = ego_start + EGO_AHEAD + rng.uniform(13, 22)
    traffic.add([Actor("vehicle.car", "vehicle.moving", ego, ahead, speed)])
    traffic.add([Actor("vehicle.car", "vehicle.moving", ego, ego_start - rng.uniform(11, 16), speed)])
    roads = [lane for lane in near if not lane.move]
    outer = [lane for lane in near if lane.index == 1]
    kerbs = [lane for lane in roads if lane.index == 1]
    _try(traffic, partial(_work_zone, city.layout, kerbs, rng))
    _try(traffic, partial(_truck_and_trailer, city, roads, rng))
    for category in ("vehicle.bus.rigid", "vehicle.truck", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bicycle"):
        _try(traffic, partial(_driver, category, city, outer, rng))
    for _ in range(9):
        _try(traffic, partial(_driver, "vehicle.car", city, near, rng))
    _park(traffic, city, rng)
    for _ in range(8):
        _try(traffic, partial(_pedestrian, city.layout, kerbs, rng))
    crossings = [curve for curve in city.crossings.values() if _distance(curve.poses([0.0])[:, :2], ego_path) < REACH]
    for _ in range(4 if crossings else 0):
        _try(traffic, partial(_crossing_pedestrian, crossings, rng))
    return traffic


def _try(traffic: Traffic, draw: Callable[[], list[Actor]]) -> None:
    for _ in range(TRIES):
        if traffic.add(draw()):
            return


def _driver(category: str, city: City, lanes: list[Lane], rng: np.random.Generator) -> list[Actor]:
    lane = lanes[rng.integers(len(lanes))]
    cycle = category in ("vehicle.bicycle", "vehicle.motorcycle")
    speed = rng.uniform(3.0, 4.5) if category == "vehicle.bicycle" else rng.uniform(4.5, 9.0)
    offset = city.layout.lane / 2 - 0.8 if category == "vehicle.bicycle" else 0.0
    attribute = "cycle.with_rider" if cycle else "vehicle.moving"
    return [Actor(category, attribute, _route(city, lane, rng), rng.uniform(0, lane.curve.length), speed, offset)]


def _truck_and_trailer(city: City, lanes: list[Lane], rng: np.random.Generator) -> list[Actor]:
    """Make a truck with a trailer."""
    lane = lanes[rng.integers(len(lanes))]
    route, speed = _route(city, lane, rng), rng.uniform(4.5, 7.0)
    start = rng.uniform(0, lane.curve.length)
    behind = (SIZES["vehicle.truck"][1] + SIZES["vehicle.trailer"][1]) / 2 + 0.9
    return [
        Actor("vehicle.truck", "vehicle.moving", route, start, speed),
        Actor("vehicle.trailer", "vehicle.moving", route, start - behind, speed),
    ]


def _work_zone(layout: Layout, lanes: list[Lane], rng: np.random.Generator) -> list[Actor]:
    """Make an excavator in a closed lane, with barriers and cones."""
    lane = lanes[rng.integers(len(lanes))]
    at = rng.uniform(8, lane.curve.length - 8)
    zone = [Actor("vehicle.construction", "vehicle.stopped", lane.curve, at, 0.0, 0.3)]
    zone += [
        Actor("movable_object.barrier", "", lane.curve, at - 6.5 - 1.6 * row, 0.0, offset)
        for row, offset in ((0, -0.2), (1, 0.3))
    ]
    zone += [
        Actor("movable_object.barrier", "", lane.curve, at + distance, 0.0, layout.lane / 2 + 0.2, np.pi / 2)
        for distance in (-3.5, 0.0, 3.5)
    ]
    zone += [
        Actor("movable_object.trafficcone", "", lane.curve, at + distance, 0.0, -layout.lane / 2 + 0.35)
        for distance in (-8.0, -5.0, -2.0, 1.0, 4.0, 7.0)
    ]
    return zone


def _pedestrian(layout: Layout, lanes: list[Lane], rng: np.random.Generator) -> list[Actor]:
    """Make a pedestrian on the walkway beside an outer lane, walking in either direction or standing."""
    lane = lanes[rng.integers(len(lanes))]
    speed = (0.0, 1.2, 1.4, -1.1, -1.4)[rng.integers(5)]
    attribute = "pedestrian.moving" if speed else "pedestrian.standing"
    offset = layout.half - 1.5 * layout.lane + rng.uniform(0.8, layout.walkway - 0.6)
    start, turn = rng.uniform(0, lane.curve.length), np.pi if speed < 0 else 0.0
    return [Actor("human.pedestrian.adult", attribute, lane.curve, start, speed, offset, turn)]


def _crossing_pedestrian(crossings: list[Curve], rng: np.random.Generator) -> list[Actor]:
    crossing = crossings[rng.integers(len(crossings))]
    start, speed, side = rng.uniform(0, crossing.length - 3), rng.uniform(1.1, 1.5), rng.uniform(-1.1, 1.1)
    return [Actor("human.pedestrian.adult", "pedestrian.moving", crossing, start, speed, side)]


def _park(traffic: Traffic, city: City, rng: np.random.Generator) -> None:
    for bay in city.bays:
        if rng.random() < 0.55:
            middle = bay.length / 2 + rng.uniform(-0.25, 0.25)
            traffic.add([Actor("vehicle.car", "vehicle.parked", bay, middle, turn=np.pi * float(rng.integers(2)))])


def _route(city: City, lane: Lane, rng: np.random.Generator) -> Curve:
    """Choose a random route from a lane, at least 300 m long or to the end of a road."""
    curve, name = lane.curve, lane.name
    while curve.length < 300 and city.outgoing[name]:
        name = city.outgoing[name][rng.integers(len(city.outgoing[name]))]
        curve = curve.joined(city.lane(name).curve)
    return curve


def _near_lanes(city: City, ego_path: Array) -> list[Lane]:
    lanes = (*city.lanes.values(), *city.connectors.values())
    return [
        lane
        for lane in lanes
        if _distance(lane.curve.poses(np.arange(0, lane.curve.length, 5))[:, :2], ego_path) < REACH
    ]


def _distance(points: Array, others: Array) -> float:
    return float(np.linalg.norm(points[:, None] - others[None], axis=-1).min())


def _discs(poses: Array, length: float, width: float) -> tuple[Array, float]:
    """Cover a rectangle at each pose (T, 3) with discs: their centres (T, D, 2) and radius."""
    count = max(1, int(np.ceil(length / width)))
    along = (np.arange(count) + 0.5) / count * length - length / 2
    heading = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=-1)
    radius = float(np.hypot(length / count, width)) / 2 + GAP / 2
    return poses[:, None, :2] + along[None, :, None] * heading[:, None], radius


def _touch(one: tuple[Array, float], other: tuple[Array, float]) -> bool:
    distances = np.linalg.norm(one[0][:, :, None] - other[0][:, None, :], axis=-1)
    return bool(distances.min() < one[1] + other[1])
