"""Changes to scenes, as a small YAML file says them (docs/editing.md): weather, objects, the way of the car.

A place is ``[right, forward]`` in metres and a heading is degrees counter-clockwise from forward, both seen from the
lidar in the scene's first frame. Times are seconds from that frame.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from magicdrive_core.config import Config, Count, PositiveFloat, Probability, Section, fingerprint
from magicdrive_core.data.records import CLASSES, ClassName
from magicdrive_core.errors import UsageError
from magicdrive_core.settings import first_fault, read_yaml

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
    hint = "docs/editing.md shows what stands in such a file"
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
