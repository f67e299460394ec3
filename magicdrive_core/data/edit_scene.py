"""Applies changes to a scene: the same kind of scene comes out, so that everything after it works as ever.

Pictures are left as they are named: they show the scene before its change. A changed way of the car needs other BEV
maps (``data.bev.rasterise``), because a map is seen from the lidar.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.edits import USUAL_SIZES, Add, Change, Drive, Edits, Move, Point, Remove, Replace
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import moved

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
            here = moved(boxes.boxes, lidar_to_start[frame])
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
                FrameBoxes([thing.token for thing in here], [thing.name for thing in here], moved(boxes, matrix))
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
