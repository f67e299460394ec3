"""Response to edits: whether a removed car is gone, a moved one has moved, and night is dark.

Each measured clip is generated again from the same noise with one edit, as ``generate.edits`` applies it, and the
edited scene is rendered, too: what the rendering changes is the most that a network can. Places are exact: the pixels
of the car in the rendered scene before and after the edit.

- *removed*: probability of vehicles where the car was, and nothing else but the background is now.
- *moved*: that probability where the car is now, less that where it was.
- *night*: mean brightness of the pictures, in grey levels of 255.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.edits import Edits, edit_scene
from magicdrive_core.data.records import Scene
from magicdrive_core.evaluation.condition_swap import Video
from magicdrive_core.evaluation.region_classifier import RegionClassifier
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import VIEWS, Framing
from magicdrive_core.synthetic.footage import Footage, edited_footage
from magicdrive_core.synthetic.light import NIGHT, Light, light_of
from magicdrive_core.synthetic.regions import Region, RegionPainter, regions_of
from magicdrive_core.synthetic.surfaces import middles
from magicdrive_core.video.frames import crop_to_frame

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]  # (V, F, H, W) of the measured frames

REMOVED, MOVED, DARKENED = "removed car", "moved car", "night"
FEWEST = 40  # pixels of a place, over all measured frames and views, below which a scene does not count
# Metres ahead and to the left of a car that it is moved by: along its lane if any of these places is free and seen.
STEPS = (((6.0, 0.0), (-6.0, 0.0), (9.0, 0.0), (-9.0, 0.0)), ((0.0, 4.0), (0.0, -4.0), (6.0, 4.0), (6.0, -4.0)))


@dataclass(frozen=True)
class EditCase:
    """One edit of one scene.

    Attributes:
        kind: ``REMOVED``, ``MOVED`` or ``DARKENED``.
        edits: The edit.
        old: Pixels that show the car before the edit, and no vehicle after it; empty for the night.
        new: Pixels that show the car after the edit, and no vehicle before it; empty but for a moved car.
        rendered: Frames of the scene before and after the edit (V, F, H, W, 3), rendered without the edit and with it.
    """

    kind: str
    edits: Edits
    old: Bits
    new: Bits
    rendered: tuple[Video, Video]

    @property
    def best_seen(self) -> tuple[int, int]:
        """The view and the measured frame that show the places best; the first frame ahead for the night."""
        pixels = (self.old | self.new).sum(axis=(2, 3))
        if not pixels.any():
            return VIEWS.index("CAM_FRONT"), 0
        view, frame = np.unravel_index(pixels.argmax(), pixels.shape)
        return int(view), int(frame)


@dataclass(frozen=True)
class Response:
    """What an edit changed, mean over the scenes.

    Attributes:
        scenes: Number of scenes.
        before: The figure without the edit.
        after: The figure with the edit.
        rendered_before: The figure of the rendered scenes without the edit.
        rendered_after: The figure of the rendered scenes with the edit.
    """

    scenes: int
    before: float
    after: float
    rendered_before: float
    rendered_after: float

    @property
    def share(self) -> float:
        """The change as a share of that of the rendered scenes: 1 at best, 0 without any response."""
        change = self.rendered_after - self.rendered_before
        return (self.after - self.before) / change if change else float("nan")

    def row(self) -> dict[str, float]:
        """Collect all figures by name.

        Returns:
            "scenes", "rendered_before", "rendered_after", "before", "after" and "share".
        """
        return {
            "scenes": self.scenes,
            "rendered_before": self.rendered_before,
            "rendered_after": self.rendered_after,
            "before": self.before,
            "after": self.after,
            "share": self.share,
        }


@dataclass(frozen=True)
class EditPlanner:
    """Chooses edits of scenes, renders the edited scenes and finds the exact places of what changes.

    Attributes:
        painter: Draws the pictures of the data root.
        framing: Size and crop of the videos.
    """

    painter: RegionPainter
    framing: Framing

    def cases(self, scene: Scene, frames: Sequence[int]) -> Iterator[EditCase]:
        """Plan the edits of a scene.

        Args:
            scene: The scene.
            frames: Indices of its measured frames.

        Yields:
            The removal and the move of its most visible car, where one covers ``FEWEST`` pixels, and the night where it
            is not night.
        """
        footage = self.painter.footage(scene.pictures[0][0])
        now, rendered = self._state(scene, footage, frames), self._rendered(scene, footage, frames)
        car = _most_visible_car(scene, footage, now)
        if car is not None:
            removal = Edits.model_validate({"objects": [{"remove": car}]})
            move = self._move(scene, footage, frames, now, car)
            for kind, edits in ((REMOVED, removal), (MOVED, move)):
                if edits is None:
                    continue
                after = edited_footage(footage, scene, edit_scene(scene, edits))
                old, new = _places(now, self._state(scene, after, frames), car)
                if old.sum() >= FEWEST and (kind == REMOVED or new.sum() >= FEWEST):
                    yield EditCase(kind, edits, old, new, (rendered, self._rendered(scene, after, frames)))
        if light_of(scene.description) is not NIGHT:
            edits = Edits(weather="night")
            after = edited_footage(footage, scene, edit_scene(scene, edits))
            nowhere = np.zeros(rendered.shape[:-1], np.bool_)
            yield EditCase(DARKENED, edits, nowhere, nowhere, (rendered, self._rendered(scene, after, frames)))

    def _rendered(self, scene: Scene, footage: Footage, frames: Sequence[int]) -> Video:
        """Render frames of a scene (V, F, H, W, 3)."""
        pictures = [
            [crop_to_frame(self.painter.render(scene.pictures[f][v], footage), self.framing) for f in frames]
            for v in range(len(VIEWS))
        ]
        return np.array(pictures)

    def _move(self, scene: Scene, footage: Footage, frames: Sequence[int], now: _State, car: str) -> Edits | None:
        """Choose the step of a car to free ground where it is seen best; None if each one is taken or hidden."""
        few = sorted({0, len(frames) // 2})  # two frames are enough to choose
        ahead = _heading(scene, car)
        for steps in STEPS:
            chosen, seen = None, 0
            for along, left in steps:
                right, forward = along * ahead + left * np.array([-ahead[1], ahead[0]])
                edits = Edits.model_validate({"objects": [{"move": car, "by": (right, forward)}]})
                edited = edit_scene(scene, edits)
                if not _is_free(edited, car):
                    continue
                after = self._state(scene, edited_footage(footage, scene, edited), [frames[at] for at in few])
                pixels = min(int(place.sum()) for place in _places(now.at(few), after, car))
                if pixels > seen:
                    chosen, seen = edits, pixels
            if chosen is not None:
                return chosen
        return None

    def _state(self, scene: Scene, footage: Footage, frames: Sequence[int]) -> _State:
        """Draw what the pixels of frames show."""
        at = middles(self.framing)
        drawn = [[self.painter.surfaces(scene.pictures[f][v], footage) for f in frames] for v in range(len(VIEWS))]
        return _State(
            [track.token for track in footage.tracks],
            np.array([[surfaces.seen_at(at) for surfaces in row] for row in drawn]),
            np.array([[regions_of(surfaces, self.framing) for surfaces in row] for row in drawn]) == Region.VEHICLE,
        )


@dataclass(frozen=True)
class _State:
    """What the pixels (V, F, H, W) of a scene's frames show."""

    tokens: list[str]  # instances, by id of their solids
    ids: NDArray[np.int64]  # at the middle of each pixel
    vehicles: Bits  # whether most of a pixel is a vehicle

    def at(self, frames: Sequence[int]) -> _State:
        """Return the state at some of the frames, by their indices in this state."""
        return replace(self, ids=self.ids[:, frames], vehicles=self.vehicles[:, frames])

    def shows(self, token: str) -> Bits:
        """Tell which pixels show an instance."""
        if token not in self.tokens:
            return np.zeros(self.ids.shape, np.bool_)
        return self.ids == self.tokens.index(token)


def _most_visible_car(scene: Scene, footage: Footage, state: _State) -> str | None:
    """Choose the car of most pixels: its instance token; None without one of ``FEWEST``."""
    listed = {token for boxes in scene.boxes for token in boxes.ids}
    pixels = {t.token: int(state.shows(t.token).sum()) for t in footage.tracks if t.name == "car" and t.token in listed}
    best = max(pixels, key=lambda token: pixels[token], default=None)
    return best if best is not None and pixels[best] >= FEWEST else None


def _heading(scene: Scene, car: str) -> Floats:
    """Return where a car heads when it first appears: a unit vector (right, forward) in the start frame."""
    lidar_to_global = scene.ego_to_global @ scene.lidar_to_ego
    frame = next(frame for frame, boxes in enumerate(scene.boxes) if car in boxes.ids)
    heading = -scene.boxes[frame].boxes[scene.boxes[frame].ids.index(car), 6] - np.pi / 2
    lidar_to_start = poses.inverse(lidar_to_global[0]) @ lidar_to_global[frame]
    ahead: Floats = lidar_to_start[:2, :2] @ [np.cos(heading), np.sin(heading)]
    return ahead


def _places(before: _State, after: _State, car: str) -> tuple[Bits, Bits]:
    """Find where a car is before and after an edit, without pixels that show a vehicle in the other state."""
    return before.shows(car) & ~after.vehicles, after.shows(car) & ~before.vehicles


class ResponseTally:
    """Sums of responses over scenes, one after the other.

    Args:
        classifier: Finds vehicles by colour.
    """

    def __init__(self, classifier: RegionClassifier) -> None:
        self._classifier = classifier
        self._rows: dict[str, list[tuple[float, float, float, float]]] = {}

    def add(self, case: EditCase, light: Light, before: Video, after: Video) -> None:
        """Count one edit of one scene.

        Args:
            case: The edit.
            light: The light of the scene before the edit.
            before: Measured frames (V, F, H, W, 3) generated without the edit.
            after: The same frames generated with it.
        """
        figures = [self._figure(case, light, video) for video in (before, after, *case.rendered)]
        self._rows.setdefault(case.kind, []).append((figures[0], figures[1], figures[2], figures[3]))

    def figures(self) -> dict[str, Response]:
        """Compute the means over the scenes.

        Returns:
            The response by kind of edit; kinds that no scene has are missing.
        """
        return {kind: Response(len(rows), *np.mean(rows, axis=0).tolist()) for kind, rows in self._rows.items()}

    def _figure(self, case: EditCase, light: Light, video: Video) -> float:
        if case.kind == DARKENED:
            return float((video @ np.array([0.299, 0.587, 0.114])).mean())
        there = [self._vehicles(light, video, place) for place in (case.old, case.new)]
        return there[0] if case.kind == REMOVED else there[1] - there[0]

    def _vehicles(self, light: Light, video: Video, place: Bits) -> float:
        """Compute the mean probability of vehicles at a place; 0 for an empty one."""
        total = 0.0
        for view, frame in zip(*np.nonzero(place.any(axis=(2, 3))), strict=True):
            shares = self._classifier.shares(light, video[view, frame])[..., Region.VEHICLE]
            total += float(shares[place[view, frame]].sum(dtype=np.float64))
        return total / max(1, int(place.sum()))


def _is_free(scene: Scene, car: str) -> bool:
    """Tell whether the circle around an object keeps clear of those around all others in every frame."""
    for boxes in scene.boxes:
        if car not in boxes.ids:
            continue
        mine = boxes.ids.index(car)
        others = np.delete(boxes.boxes, mine, axis=0)
        reach = np.linalg.norm(others[:, 3:5], axis=1) / 2 + np.linalg.norm(boxes.boxes[mine, 3:5]) / 2
        away = np.linalg.norm(others[:, :2] - boxes.boxes[mine, :2], axis=1)
        if (away < reach).any():
            return False
    return True
