"""Scene edits: a small YAML file changes the weather, the objects or the ego trajectory of scenes.

Positions are ``[right, forward]`` in metres and headings are degrees counter-clockwise from forward, both in the lidar
frame of the scene's first frame, the *start frame*. Times are seconds from that frame.

``Edits`` is the schema of the file; ``edit_scene`` applies it. The result is an ordinary ``Scene``, so that all later
steps work unchanged. Its picture paths still lead to the unedited pictures, and a new ego trajectory needs new BEV maps
(``bev_maps.rasterise``), because maps are centred on the lidar.
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
from einops import repeat
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, field_validator

from magicdrive_core.config.load import first_fault, read_yaml
from magicdrive_core.config.schema import Config, Count, PositiveFloat, Probability, Section, fingerprint
from magicdrive_core.data.records import CLASSES, ClassName, FrameBoxes, Scene
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import transform_boxes

Floats = NDArray[np.float64]
Position = tuple[float, float]  # right, forward in metres
Size = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
# Width, length and height in metres of objects that are added without a size: rounded means of nuScenes.
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
WEATHER = {"daytime": "Daytime", "rain": "Rain", "night": "Night"}  # first word of the description
_WEATHER_WORDS = re.compile(r"\b(after rain|daytime|night|rainy|raining|rain)\b[\s,.;]*", re.IGNORECASE)


class Waypoint(Section):
    """The position of an object at one time."""

    at: Position
    second: Annotated[float, Field(ge=0)] = 0.0
    heading: float | None = None  # degrees; default: along the trajectory, or forward if it has no direction


def _check_rising(points: list[Waypoint]) -> list[Waypoint]:
    if any(later.second <= point.second for point, later in pairwise(points)):
        raise ValueError("the seconds of the points must rise")
    return points


Waypoints = Annotated[list[Waypoint], Field(min_length=1), AfterValidator(_check_rising)]


class Add(Section):
    """Add an object, present from the time of its first point to that of its last; with one point, it stands always."""

    add: ClassName
    points: Waypoints
    size: Size | None = None  # width, length, height in metres


class Remove(Section):
    """Remove an object."""

    remove: str  # instance token, or its first characters


class Move(Section):
    """Shift and rotate an object, by the same amount at all times."""

    move: str
    by: Position = (0.0, 0.0)
    turn: float = 0.0  # degrees counter-clockwise, about the centre of the object


class Replace(Section):
    """Replace an object by one of another class, on the same ground with the same heading."""

    replace: str
    with_: ClassName = Field(alias="with")
    size: Size | None = None


class Drive(Section):
    """Give an existing object a new trajectory; its size and class stay."""

    drive: str
    points: Waypoints


Change = Add | Remove | Move | Replace | Drive
_KINDS: dict[str, type[Section]] = {"add": Add, "remove": Remove, "move": Move, "replace": Replace, "drive": Drive}


class Edits(Section):
    """An edits file, applied in this order: weather, classes, drop_nearest_cars, drop_boxes, objects, ego."""

    scenes: list[str] | None = None  # names; null: every scene
    weather: Literal["daytime", "rain", "night"] | None = None  # in the caption only
    classes: list[ClassName] | None = None  # keep only objects of these classes
    drop_nearest_cars: Count = 0  # number of cars to remove, by their least distance to the lidar
    drop_boxes: Probability = 0.0  # share of the objects to remove
    seed: Count = 0  # of the random choice of drop_boxes
    objects: tuple[Change, ...] = ()
    ego: Waypoints | None = None  # ego trajectory of the lidar; it stands before the first and after the last point

    @property
    def digest(self) -> str:
        """Digest of the edits, for fingerprints: 64 hex digits."""
        return fingerprint(self)

    def concerns(self, scene: str) -> bool:
        """Check whether the edits apply to a scene.

        Args:
            scene: name of the scene.

        Returns:
            True for every scene if the file lists none.
        """
        return self.scenes is None or scene in self.scenes

    def moves_lidar(self, scene: str) -> bool:
        """Check whether a scene needs BEV maps other than those of the infos.

        Args:
            scene: name of the scene.

        Returns:
            Whether the edits give this scene a new ego trajectory.
        """
        return self.ego is not None and self.concerns(scene)

    @field_validator("objects", mode="before")
    @classmethod
    def _by_kind(cls, values: Any) -> Any:
        """Choose the model of each change by its verb, so that errors name only the keys of that model."""
        if not isinstance(values, list):
            raise ValueError("write a list of changes")
        return [_parse_change(number, value) for number, value in enumerate(values)]


def chosen_edits(config: Config, project: Path = Path()) -> Edits:
    """Read the edits file of the setting ``generate.edits``; without one, return edits that change nothing.

    Args:
        config: the whole configuration.
        project: the project's folder, which the setting is relative to.

    Returns:
        The edits.

    Raises:
        UsageError: the file is unusable, see ``load_edits``.
    """
    return load_edits(project / config.generate.edits) if config.generate.edits else Edits()


def load_edits(path: Path | str) -> Edits:
    """Read an edits file.

    Args:
        path: the YAML file; docs/how-to/edit-scenes.md describes it.

    Returns:
        The edits; an empty file gives edits that change nothing.

    Raises:
        UsageError: the file is missing or not YAML, or has an unknown key or impossible value; the message names it.
    """
    hint = "docs/how-to/edit-scenes.md describes the file"
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


def edit_scene(scene: Scene, edits: Edits) -> Scene:
    """Apply edits to a scene; a scene that they do not concern is returned as it is.

    Args:
        scene: the scene, which is not changed.
        edits: the edits.

    Returns:
        A scene with new boxes and, if the edits ask for them, a new description and new ego poses. Frames, cameras and
        picture paths stay.

    Raises:
        UsageError: a change names no object of the scene, or several.
    """
    if not edits.concerns(scene.name) or edits == Edits(scenes=edits.scenes):
        return scene
    edited = _EditedScene.of(scene)
    if edits.classes is not None:
        allowed = set(edits.classes)
        edited.keep(lambda item: item.name in allowed)
    edited.drop_nearest("car", edits.drop_nearest_cars)
    edited.drop_share(edits.drop_boxes, [edits.seed, zlib.crc32(scene.token.encode())])
    for number, change in enumerate(edits.objects):
        edited.change(number, change)
    lidar_to_global = edited.lidar_to_global if edits.ego is None else edited.lidar_along(edits.ego)
    return replace(
        scene,
        description=scene.description if edits.weather is None else describe_weather(edits.weather, scene.description),
        ego_to_global=scene.ego_to_global if edits.ego is None else lidar_to_global @ poses.inverse(scene.lidar_to_ego),
        boxes=edited.seen_from(lidar_to_global),
    )


def describe_weather(weather: str, description: str) -> str:
    """Replace the weather and time of day in a description: the new one first, words of the old one removed.

    Args:
        weather: "daytime", "rain" or "night".
        description: description of a scene, such as "Rain, turn left".

    Returns:
        The new description, such as "Night. Turn left".
    """
    rest = _WEATHER_WORDS.sub("", description).strip()
    return f"{WEATHER[weather]}. {rest[:1].upper()}{rest[1:]}".strip()


@dataclass
class _EditedObject:
    """One object over the F frames of a scene; NaN in frames where it is absent."""

    token: str
    name: str
    boxes: Floats  # F, 7: rows like those of FrameBoxes, in the start frame


@dataclass
class _EditedScene:
    """The objects of a scene in a common frame of reference, the start frame."""

    scene: Scene
    objects: list[_EditedObject]
    lidar_to_global: Floats  # F, 4, 4
    seconds: Floats  # F

    @classmethod
    def of(cls, scene: Scene) -> _EditedScene:
        """Collect the boxes of each object over all frames, in the start frame.

        Args:
            scene: the scene, which is not changed.

        Returns:
            A copy of its objects, in the order of their first frames.
        """
        lidar_to_global = scene.ego_to_global @ scene.lidar_to_ego
        lidar_to_start = poses.inverse(lidar_to_global[0]) @ lidar_to_global
        objects: dict[str, _EditedObject] = {}
        for frame, boxes in enumerate(scene.boxes):
            here = transform_boxes(boxes.boxes, lidar_to_start[frame])
            for token, name, box in zip(boxes.ids, boxes.names, here, strict=True):
                if token not in objects:
                    objects[token] = _EditedObject(token, name, np.full((len(scene), 7), np.nan))
                objects[token].boxes[frame] = box
        seconds = (scene.timestamps - scene.timestamps[0]) / 1e6
        return cls(scene, list(objects.values()), lidar_to_global, seconds)

    def keep(self, wanted: Callable[[_EditedObject], bool]) -> None:
        """Remove all objects but the wanted ones.

        Args:
            wanted: says whether to keep an object.
        """
        self.objects = [item for item in self.objects if wanted(item)]

    def drop_nearest(self, name: str, count: int) -> None:
        """Remove the objects of a class that come nearest to the lidar.

        Args:
            name: the class.
            count: how many to remove; nearness is the least distance on the ground over all frames.
        """
        lidar = (poses.inverse(self.lidar_to_global[0]) @ self.lidar_to_global)[:, :2, 3]

        def distance(item: _EditedObject) -> float:
            return float(np.nanmin(np.linalg.norm(item.boxes[:, :2] - lidar, axis=1)))

        nearest = sorted((item for item in self.objects if item.name == name), key=distance)[:count]
        gone = {item.token for item in nearest}
        self.keep(lambda item: item.token not in gone)

    def drop_share(self, share: float, seed: Sequence[int]) -> None:
        """Remove a random share of the objects.

        Args:
            share: share of the objects, from 0 to 1; their number is rounded down.
            seed: seed of the choice, which does not depend on the order of the objects.
        """
        tokens = sorted(item.token for item in self.objects)
        order = np.random.default_rng(seed).permutation(len(tokens))
        gone = {tokens[index] for index in order[: int(share * len(tokens))]}
        self.keep(lambda item: item.token not in gone)

    def change(self, number: int, change: Change) -> None:
        """Apply one entry of ``Edits.objects``.

        Args:
            number: index of the entry, for messages and the token of an added object.
            change: the entry.

        Raises:
            UsageError: the entry names no object of the scene, or several.
        """
        match change:
            case Add():
                size = change.size or USUAL_SIZES[change.add]
                boxes = self.along(change.points, size)
                self.objects.append(_EditedObject(f"added-{number}", change.add, boxes))
            case Remove():
                item = self.find(number, change.remove)
                self.objects.remove(item)
            case Move():
                item = self.find(number, change.move)
                item.boxes[:, :2] += change.by
                item.boxes[:, 6] -= np.radians(change.turn)  # yaw' = -yaw - pi/2
            case Replace():
                item = self.find(number, change.replace)
                size = change.size or USUAL_SIZES[change.with_]
                item.boxes[:, 2] += (size[2] - item.boxes[:, 5]) / 2
                item.boxes[:, 3:6] = np.where(np.isnan(item.boxes[:, :1]), np.nan, size)
                item.name = change.with_
            case Drive():
                item = self.find(number, change.drive)
                item.boxes = self.along(change.points, np.nanmean(item.boxes[:, 3:6], axis=0))

    def find(self, number: int, token: str) -> _EditedObject:
        """Find the object of an entry.

        Args:
            number: index of the entry, for the message.
            token: instance token, or its first characters.

        Returns:
            The object with this token, otherwise the only one whose token starts with it.

        Raises:
            UsageError: no object matches, or several.
        """
        found = [item for item in self.objects if item.token.startswith(token)]
        exact = [item for item in found if item.token == token]
        if len(exact or found) != 1:
            fault = f"{len(found)} objects match" if found else "no object matches"
            raise UsageError(
                f"objects, entry {number}: {fault} {token!r} in {self.scene.name}",
                f"list the objects with `magicdrive preview-edits --scene {self.scene.name}`",
            )
        return (exact or found)[0]

    def along(self, points: Sequence[Waypoint], size: Sequence[float] | Floats) -> Floats:
        """Move an object through points on the ground.

        Args:
            points: the trajectory in the start frame; with one point the object is present in every frame.
            size: width, length and height in metres.

        Returns:
            (F, 7) boxes in the start frame; NaN before the first and after the last of several points.
        """
        positions, headings = follow(points, self.seconds)
        heights = self.ground_at(positions) + size[2] / 2
        sizes = repeat(np.asarray(size), "c -> f c", f=len(positions))
        rows = np.column_stack([positions, heights, sizes, -headings - np.pi])
        if len(points) > 1:
            present = (self.seconds >= points[0].second - 1e-6) & (self.seconds <= points[-1].second + 1e-6)
            rows[~present] = np.nan
        return rows

    def ground_at(self, positions: Floats) -> Floats:
        """Estimate the height of the ground: that below the ego car where it comes nearest.

        Args:
            positions: (n, 2) metres right and forward in the start frame.

        Returns:
            (n,) heights in metres, z of the start frame.
        """
        start_from_ego = poses.inverse(self.lidar_to_global[0]) @ self.scene.ego_to_global
        ground = start_from_ego[:, :3, 3]  # the origin of the ego frame is on the ground
        nearest = np.linalg.norm(positions[:, None] - ground[None, :, :2], axis=-1).argmin(axis=1)
        return ground[nearest, 2]

    def lidar_along(self, points: Sequence[Waypoint]) -> Floats:
        """Move the lidar along points, at the height above ground and tilt of the start.

        Args:
            points: the trajectory of the lidar in the start frame.

        Returns:
            (F, 4, 4) lidar to global.
        """
        positions, headings = follow(points, self.seconds)
        start = np.zeros(2)[None]
        turn = np.zeros((len(positions), 4))
        turn[:, 0], turn[:, 3] = np.cos(headings / 2), np.sin(headings / 2)
        heights = self.ground_at(positions) - self.ground_at(start)
        return self.lidar_to_global[0] @ poses.pose(turn, np.column_stack([positions, heights]))

    def seen_from(self, lidar_to_global: Floats) -> list[FrameBoxes]:
        """Convert the objects to the boxes of each lidar frame.

        Args:
            lidar_to_global: (F, 4, 4) poses of the lidar.

        Returns:
            F frames of boxes; a frame holds the objects that are present in it.
        """
        start_to_lidar = poses.inverse(lidar_to_global) @ self.lidar_to_global[0]
        out = []
        for frame, matrix in enumerate(start_to_lidar):
            present = [item for item in self.objects if np.isfinite(item.boxes[frame, 0])]
            boxes = np.array([item.boxes[frame] for item in present]).reshape(-1, 7)
            out.append(
                FrameBoxes(
                    [item.token for item in present], [item.name for item in present], transform_boxes(boxes, matrix)
                )
            )
        return out


def follow(points: Sequence[Waypoint], seconds: Floats) -> tuple[Floats, Floats]:
    """Follow a trajectory that is straight between its points.

    A point without a heading takes the direction to the next point, the last one that from the previous point.

    Args:
        points: the points, in order of time.
        seconds: (n,) times from the start frame.

    Returns:
        (n, 2) positions, and (n,) headings in radians counter-clockwise from forward.
    """
    times = np.array([point.second for point in points])
    corners = np.array([point.at for point in points], np.float64)
    positions = np.column_stack([np.interp(seconds, times, corners[:, axis]) for axis in (0, 1)])
    headings = []
    for index, point in enumerate(points):
        if point.heading is not None:
            headings.append(np.radians(point.heading))
            continue
        legs = [corners[i + 1] - corners[i] for i in (index, index - 1) if 0 <= i < len(corners) - 1]
        leg = next((leg for leg in legs if np.any(leg)), np.array([0.0, 1.0]))
        headings.append(np.arctan2(-leg[0], leg[1]))
    return positions, np.interp(seconds, times, np.unwrap(headings))
