"""Changes to scenes, as a small YAML file says them (docs/how-to/edit-scenes.md): weather, objects, the way of the car.

A place is ``[right, forward]`` in metres and a heading is degrees counter-clockwise from forward, both seen from the
lidar in the scene's first frame. Times are seconds from that frame.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator

from magicdrive_core.config.load import first_fault, read_yaml
from magicdrive_core.config.schema import Config, Count, PositiveFloat, Probability, Section, fingerprint
from magicdrive_core.data.records import CLASSES, ClassName, FrameBoxes, Scene
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import transform_boxes

Place = tuple[float, float]
Size = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
# Width, length and height in metres of an object that is added without a size: rounded means of nuScenes.
USUAL_SIZES: dict[ClassName, Size] = {
    "car": (1.95, 4.6, 1.7),
    "truck": (2.5, 6.9, 2.8),
    "construction_vehicle": (2.8, 6.4, 3.2),
    "bus": (2.9, 11.0, 3.5),
    "trailer": (2.9, 12.3, 3.9),
    "barrier": (2.5, 0.5, 1.0),
    "motorcycle": (0.8, 2.1, 1.5),
    "bicycle": (0.6, 1.7, 1.3),
    "pedestrian": (0.7, 0.7, 1.8),
    "traffic_cone": (0.4, 0.4, 1.1),
}
assert set(USUAL_SIZES) == set(CLASSES)


class Point(Section):
    """Where something is at one time."""

    at: Place
    second: Annotated[float, Field(ge=0)] = 0.0
    heading: float | None = None  # degrees; left out: along the way, or forward where there is none


Points = Annotated[list[Point], Field(min_length=1)]


class _Way(Section):
    points: Points

    @field_validator("points")
    @classmethod
    def _rising(cls, points: list[Point]) -> list[Point]:
        if any(later.second <= point.second for point, later in pairwise(points)):
            raise ValueError("the seconds of the points must rise")
        return points


class Add(_Way):
    """A new object, there from its first point's time to its last one's; with one point it stands all the time."""

    add: ClassName
    size: Size | None = None  # width, length, height


class Remove(Section):
    """Takes an object out."""

    remove: str  # its token, or the beginning of it


class Move(Section):
    """Shifts and turns an object, at all times alike."""

    move: str
    by: Place = (0.0, 0.0)
    turn: float = 0.0  # degrees counter-clockwise, about its own centre


class Replace(Section):
    """Another object at the same place: it stands on the same ground with the same heading."""

    replace: str
    with_: ClassName = Field(alias="with")
    size: Size | None = None


class Drive(_Way):
    """A trajectory for an object that is there already, in place of its own; size and class stay."""

    drive: str


Change = Add | Remove | Move | Replace | Drive
_KINDS: dict[str, type[Section]] = {"add": Add, "remove": Remove, "move": Move, "replace": Replace, "drive": Drive}


class Edits(Section):
    """The whole of such a file. Done in this order: weather, classes, drop_nearest_cars, drop_boxes, objects, ego."""

    scenes: list[str] | None = None  # names; null: every scene
    weather: Literal["daytime", "rain", "night"] | None = None  # what the text says
    classes: list[ClassName] | None = None  # only objects of these classes stay
    drop_nearest_cars: Count = 0  # so many, by their least distance to the lidar in the scene
    drop_boxes: Probability = 0.0  # share of the objects
    seed: Count = 0  # of the draw of drop_boxes
    objects: tuple[Change, ...] = ()
    ego: Points | None = None  # the lidar's way; before the first and after the last point it stands

    @property
    def digest(self) -> str:
        """Changes with what is asked for."""
        return fingerprint(self)

    def concerns(self, scene: str) -> bool:
        """Whether a scene of this name is to be changed."""
        return self.scenes is None or scene in self.scenes

    def moves_lidar(self, scene: str) -> bool:
        """Whether a scene's BEV maps are others than those of the infos."""
        return self.ego is not None and self.concerns(scene)

    @field_validator("objects", mode="before")
    @classmethod
    def _by_kind(cls, values: Any) -> Any:
        """Chooses the kind of each change by its verb, so that errors speak of that kind alone."""
        if not isinstance(values, list):
            raise ValueError("write a list of changes")
        return [_parse_change(number, value) for number, value in enumerate(values)]

    @field_validator("ego")
    @classmethod
    def _rising(cls, points: list[Point] | None) -> list[Point] | None:
        if points and any(later.second <= point.second for point, later in pairwise(points)):
            raise ValueError("the seconds of the points must rise")
        return points


def chosen_edits(config: Config, project: Path = Path()) -> Edits:
    """What ``generate.edits`` names, read again at each call; changes of nothing where it names nothing.

    Raises:
        UsageError: as ``load_edits``.
    """
    return load_edits(project / config.generate.edits) if config.generate.edits else Edits()


def load_edits(path: Path | str) -> Edits:
    """Reads a file of changes.

    Raises:
        UsageError: missing, not YAML, or a key or value that is none, named.
    """
    hint = "docs/how-to/edit-scenes.md shows what stands in such a file"
    values = read_yaml(path, hint)
    try:
        return Edits.model_validate({} if values is None else values)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_fault(error, Edits)}", hint) from None


def _parse_change(number: int, value: Any) -> Section:
    verbs = [verb for verb in _KINDS if isinstance(value, dict) and verb in value]
    if len(verbs) != 1:
        raise ValueError(f"entry {number} must have exactly one of: {', '.join(_KINDS)}")
    kind = _KINDS[verbs[0]]
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"entry {number} ({verbs[0]}): {first_fault(error, kind)}") from None


# Applies changes to a scene: the same kind of scene comes out, so that everything after it works as ever.
#
# Pictures are left as they are named: they show the scene before its change. A changed way of the car needs other BEV
# maps (``data.bev.rasterise``), because a map is seen from the lidar.

Floats = NDArray[np.float64]

WEATHER = {"daytime": "Daytime", "rain": "Rain", "night": "Night"}
_WEATHER_WORDS = re.compile(r"\b(after rain|daytime|night|rainy|raining|rain)\b[\s,.;]*", re.IGNORECASE)


def edit_scene(scene: Scene, edits: Edits) -> Scene:
    """The scene as it is after the changes; the same one where they are not for it.

    Raises:
        UsageError: a change names an object that the scene does not hold, or not one alone.
    """
    if not edits.concerns(scene.name) or edits == Edits(scenes=edits.scenes):
        return scene
    world = _World.of(scene)
    if edits.classes is not None:
        allowed = set(edits.classes)
        world.keep(lambda thing: thing.name in allowed)
    world.drop_nearest("car", edits.drop_nearest_cars)
    world.drop_share(edits.drop_boxes, [edits.seed, zlib.crc32(scene.token.encode())])
    for number, change in enumerate(edits.objects):
        world.change(number, change)
    lidar_to_global = world.lidar_to_global if edits.ego is None else world.way_of_lidar(edits.ego)
    return replace(
        scene,
        description=scene.description if edits.weather is None else under(edits.weather, scene.description),
        ego_to_global=scene.ego_to_global if edits.ego is None else lidar_to_global @ poses.inverse(scene.lidar_to_ego),
        boxes=world.seen_from(lidar_to_global),
    )


def under(weather: str, description: str) -> str:
    """A scene's description with another weather or time of day, in front, and without its own."""
    rest = _WEATHER_WORDS.sub("", description).strip()
    return f"{WEATHER[weather]}. {rest[:1].upper()}{rest[1:]}".strip()


@dataclass
class _Thing:
    """One object over the F frames of a scene, as boxes of the start frame; NaN where it is absent."""

    token: str
    name: str
    boxes: Floats  # F, 7: as rows of FrameBoxes, in the lidar frame of the scene's first frame


@dataclass
class _World:
    """The objects of a scene in one frame of reference, the lidar's in the first frame."""

    scene: Scene
    things: list[_Thing]
    lidar_to_global: Floats  # F, 4, 4
    seconds: Floats  # F

    @classmethod
    def of(cls, scene: Scene) -> _World:
        lidar_to_global = scene.ego_to_global @ scene.lidar_to_ego
        lidar_to_start = poses.inverse(lidar_to_global[0]) @ lidar_to_global
        things: dict[str, _Thing] = {}
        for frame, boxes in enumerate(scene.boxes):
            here = transform_boxes(boxes.boxes, lidar_to_start[frame])
            for token, name, box in zip(boxes.ids, boxes.names, here, strict=True):
                if token not in things:
                    things[token] = _Thing(token, name, np.full((len(scene), 7), np.nan))
                things[token].boxes[frame] = box
        seconds = (scene.timestamps - scene.timestamps[0]) / 1e6
        return cls(scene, list(things.values()), lidar_to_global, seconds)

    def keep(self, wanted: Callable[[_Thing], bool]) -> None:
        self.things = [thing for thing in self.things if wanted(thing)]

    def drop_nearest(self, name: str, count: int) -> None:
        places = (poses.inverse(self.lidar_to_global[0]) @ self.lidar_to_global)[:, :2, 3]

        def distance(thing: _Thing) -> float:
            return float(np.nanmin(np.linalg.norm(thing.boxes[:, :2] - places, axis=1)))

        nearest = sorted((thing for thing in self.things if thing.name == name), key=distance)[:count]
        gone = {thing.token for thing in nearest}
        self.keep(lambda thing: thing.token not in gone)

    def drop_share(self, share: float, seed: Sequence[int]) -> None:
        tokens = sorted(thing.token for thing in self.things)
        order = np.random.default_rng(seed).permutation(len(tokens))
        gone = {tokens[index] for index in order[: int(share * len(tokens))]}
        self.keep(lambda thing: thing.token not in gone)

    def change(self, number: int, change: Change) -> None:
        match change:
            case Add():
                size = change.size or USUAL_SIZES[change.add]
                boxes = self.along(change.points, size)
                self.things.append(_Thing(f"added-{number}", change.add, boxes))
            case Remove():
                thing = self.find(number, change.remove)
                self.things.remove(thing)
            case Move():
                thing = self.find(number, change.move)
                thing.boxes[:, :2] += change.by
                thing.boxes[:, 6] -= np.radians(change.turn)  # yaw' = -yaw - pi/2
            case Replace():
                thing = self.find(number, change.replace)
                size = change.size or USUAL_SIZES[change.with_]
                thing.boxes[:, 2] += (size[2] - thing.boxes[:, 5]) / 2
                thing.boxes[:, 3:6] = np.where(np.isnan(thing.boxes[:, :1]), np.nan, size)
                thing.name = change.with_
            case Drive():
                thing = self.find(number, change.drive)
                thing.boxes = self.along(change.points, np.nanmean(thing.boxes[:, 3:6], axis=0))

    def find(self, number: int, token: str) -> _Thing:
        found = [thing for thing in self.things if thing.token.startswith(token)]
        exact = [thing for thing in found if thing.token == token]
        if len(exact or found) != 1:
            fault = f"{len(found)} objects begin" if found else "no object begins"
            raise UsageError(
                f"objects, entry {number}: {fault} with {token!r} in {self.scene.name}",
                f"magicdrive preview-edits lists them: --scene {self.scene.name}",
            )
        return (exact or found)[0]

    def along(self, points: Sequence[Point], size: Sequence[float] | Floats) -> Floats:
        """Boxes (F, 7) of something of a size (w, l, h) that goes through points and stands on the ground."""
        places, headings = way(points, self.seconds)
        ground = self.heights(places) + size[2] / 2
        rows = np.column_stack([places, ground, np.tile(size, (len(places), 1)), -headings - np.pi])
        if len(points) > 1:
            there = (self.seconds >= points[0].second - 1e-6) & (self.seconds <= points[-1].second + 1e-6)
            rows[~there] = np.nan
        return rows

    def heights(self, places: Floats) -> Floats:
        """The ground's height (n) at places (n, 2): that below the car where it comes nearest."""
        start_from_ego = poses.inverse(self.lidar_to_global[0]) @ self.scene.ego_to_global
        ground = start_from_ego[:, :3, 3]  # the ego frame's origin lies on the ground
        nearest = np.linalg.norm(places[:, None] - ground[None, :, :2], axis=-1).argmin(axis=1)
        return ground[nearest, 2]

    def way_of_lidar(self, points: Sequence[Point]) -> Floats:
        """Lidar to global (F, 4, 4) along points; its height above the ground stays, tilts are those of the start."""
        places, headings = way(points, self.seconds)
        start = np.zeros(2)[None]
        turn = np.zeros((len(places), 4))
        turn[:, 0], turn[:, 3] = np.cos(headings / 2), np.sin(headings / 2)
        heights = self.heights(places) - self.heights(start)
        return self.lidar_to_global[0] @ poses.pose(turn, np.column_stack([places, heights]))

    def seen_from(self, lidar_to_global: Floats) -> list[FrameBoxes]:
        """The objects as boxes of the lidar frames."""
        start_to_lidar = poses.inverse(lidar_to_global) @ self.lidar_to_global[0]
        out = []
        for frame, matrix in enumerate(start_to_lidar):
            here = [thing for thing in self.things if np.isfinite(thing.boxes[frame, 0])]
            boxes = np.array([thing.boxes[frame] for thing in here]).reshape(-1, 7)
            out.append(
                FrameBoxes(
                    [thing.token for thing in here], [thing.name for thing in here], transform_boxes(boxes, matrix)
                )
            )
        return out


def way(points: Sequence[Point], seconds: Floats) -> tuple[Floats, Floats]:
    """Places (n, 2) and headings (n, radians counter-clockwise from forward) at times, straight between points.

    A point without a heading looks along the way that leaves it, the last one along the way that reached it.
    """
    times = np.array([point.second for point in points])
    corners = np.array([point.at for point in points], np.float64)
    places = np.column_stack([np.interp(seconds, times, corners[:, axis]) for axis in (0, 1)])
    headings = []
    for index, point in enumerate(points):
        if point.heading is not None:
            headings.append(np.radians(point.heading))
            continue
        legs = [corners[i + 1] - corners[i] for i in (index, index - 1) if 0 <= i < len(corners) - 1]
        leg = next((leg for leg in legs if np.any(leg)), np.array([0.0, 1.0]))
        headings.append(np.arctan2(-leg[0], leg[1]))
    return places, np.interp(seconds, times, np.unwrap(headings))
