"""What happens in each generated scene: where, in which light, along which way, and in which words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config import Synth
from magicdrive_core.data.synthetic.city import CITIES, City, city
from magicdrive_core.data.synthetic.curves import Curve
from magicdrive_core.data.synthetic.rig import KEY_PERIOD
from magicdrive_core.data.synthetic.traffic import Traffic, populate

Array = NDArray[np.float64]

LIGHTS = ("day", "night", "rain")
PLANS = ("straight", "left", "right")
SPEEDS = {"straight": (7.0, 9.5), "left": (5.2, 6.2), "right": (5.0, 5.5)}  # m/s, from and to
WORDS = {
    "straight": ("go straight across the intersection", "drive along a wide street", "cross the intersection"),
    "left": ("turn left at the intersection", "wide left turn"),
    "right": ("turn right at the intersection", "tight right turn"),
}
PREFIX = {"day": "", "night": "Night, ", "rain": "Rain, "}
FAR, NEAR = 25.0, 3.0  # metres before the junction within which single moments lie: its marks are in sight
FIRST_TIME = 1_700_000_000_000_000  # microseconds: the first scene's first key frame
SCENE_PITCH = 60_000_000  # microseconds from scene to scene


@dataclass(frozen=True)
class Plan:
    """A scene before it is written."""

    index: int
    name: str
    location: str
    light: str
    description: str
    first_time: int  # microseconds of the first key frame
    key_frames: int
    route: Curve
    start: float  # metres along the route at the first key frame
    speed: float  # m/s
    traffic: Traffic

    def ego_poses(self, times: Array) -> Array:
        """The ego's x, y, heading (N, 3) at times (N,) in microseconds."""
        return self.route.poses(self.start + self.speed * (times - self.first_time) / 1e6)


def plan_scene(synth: Synth, index: int) -> Plan:
    """Plans one scene; the same settings and index give the same plan."""
    rng = np.random.default_rng([synth.seed, index])
    light = LIGHTS[index % len(LIGHTS)]
    location = list(CITIES)[index % len(CITIES)]
    move = PLANS[(index + index // len(PLANS)) % len(PLANS)]
    speed = float(rng.uniform(*SPEEDS[move]))
    key_frames = int(synth.seconds * 1e6 / KEY_PERIOD + 1e-6) + 1
    seconds = (key_frames - 1) * KEY_PERIOD / 1e6
    streets = city(location)
    route, turn_at = _route(streets, move, speed * seconds, rng)
    start = max(6.0, turn_at - 0.45 * speed * seconds - 4.0)
    if key_frames == 1:  # one moment of such a drive: the caption does not tell how far the junction is
        start = turn_at - float(rng.uniform(NEAR, FAR))
    traffic = populate(streets, route, start, speed, seconds, rng)
    words = [WORDS[move][rng.integers(len(WORDS[move]))], *_sights(traffic, rng)]
    text = PREFIX[light] + ", ".join(words)
    return Plan(
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


def _route(streets: City, move: str, distance: float, rng: np.random.Generator) -> tuple[Curve, float]:
    """A way through the city whose first junction is taken by ``move``: the curve, and where that junction begins.

    Turns are taken from the lane that turns: the inner one to the left, the outer one to the right. Dead ends are
    left out by looking ahead for as long as the scene lasts.
    """
    mirrored = CITIES[streets.location][0]
    cars_move = {"left": "right", "right": "left"}.get(move, move) if mirrored else move  # as built, before mirroring
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
    raise AssertionError("the city has no such way")


def _onward(streets: City, name: str, needed: float) -> list[str] | None:
    """Lanes from ``name`` on that are together at least ``needed`` metres long, straight where that goes on."""
    length = streets.lane(name).curve.length
    if length >= needed:
        return [name]
    for successor in streets.outgoing[name]:
        rest = _onward(streets, successor, needed - length)
        if rest is not None:
            return [name, *rest]
    return None


def _sights(traffic: Traffic, rng: np.random.Generator) -> list[str]:
    """Some of what is there, in words."""
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
