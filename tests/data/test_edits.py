"""Scene edits: their effect on boxes, caption and ego trajectory, and the files that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.data.edits import Edits, Waypoint, describe_weather, edit_scene, follow, load_edits
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import transform_boxes

F = 13
HEIGHT = 1.8  # of the lidar


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Straight ego trajectory at 6 m/s; a parked car, a car ahead at equal speed, a pedestrian in the first half."""
    seconds = np.arange(F) / 12
    lidar_to_ego = poses.pose([np.sqrt(0.5), 0, 0, -np.sqrt(0.5)], [1.0, 0, HEIGHT])
    heading = 0.7
    ego_to_global = poses.pose(
        np.tile([np.cos(heading / 2), 0, 0, np.sin(heading / 2)], (F, 1)),
        np.stack([100 + 6 * seconds * np.cos(heading), 50 + 6 * seconds * np.sin(heading), np.zeros(F)], axis=1),
    )
    boxes = []
    for frame, second in enumerate(seconds):
        rows = [
            ("parked", "car", [-3, 20 - 6 * second, -1, 2, 4.5, 1.6, -np.pi]),
            ("ahead", "car", [0, 12, -1, 2, 4.5, 1.6, -np.pi]),
        ]
        if frame < 6:
            rows.append(("walker", "pedestrian", [5, 8 - 6 * second, -0.9, 0.7, 0.7, 1.8, 0.3]))
        boxes.append(FrameBoxes([r[0] for r in rows], [r[1] for r in rows], np.array([r[2] for r in rows], float)))
    return Scene(
        token="scene-token",
        name="scene-0001",
        split="val",
        location="boston-seaport",
        description="Rain, parked cars, peds",
        tokens=[f"{frame:x}" for frame in range(F)],
        key_frames=np.arange(F) % 6 == 0,
        timestamps=(1_000_000 + seconds * 1e6).astype(np.int64),
        lidar_to_ego=np.tile(lidar_to_ego, (F, 1, 1)),
        ego_to_global=ego_to_global,
        pictures=[[""] * 6] * F,
        intrinsics=np.tile(np.eye(3), (F, 6, 1, 1)),
        camera_to_lidar=np.tile(np.eye(4), (F, 6, 1, 1)),
        boxes=boxes,
    )


def edited(scene: Scene, **values: Any) -> Scene:
    return edit_scene(scene, Edits.model_validate(values))


def box(scene: Scene, frame: int, token: str) -> np.ndarray:
    return scene.boxes[frame].boxes[scene.boxes[frame].ids.index(token)]


def assert_boxes(actual: np.ndarray, wanted: Any) -> None:
    """Check that rows are equal; headings may differ by whole turns."""
    np.testing.assert_allclose(actual[:6], np.asarray(wanted)[:6], atol=1e-6)
    turns = (actual[6] - wanted[6]) / (2 * np.pi)
    np.testing.assert_allclose(turns, np.rint(turns), atol=1e-6)


def test_empty_edits_change_nothing(scene: Scene) -> None:
    assert edited(scene) is scene
    assert edited(scene, scenes=["scene-0002"], weather="night") is scene
    same = edited(scene, classes=["car", "pedestrian"])
    for own, other in zip(same.boxes, scene.boxes, strict=True):
        assert own.ids == other.ids
        for row, wanted in zip(own.boxes, other.boxes, strict=True):
            assert_boxes(row, wanted)


@pytest.mark.parametrize(
    ("weather", "description", "wanted"),
    [
        ("night", "Rain, parked cars, peds", "Night. Parked cars, peds"),
        ("daytime", "Night, big street, train station", "Daytime. Big street, train station"),
        ("rain", "Turn left, terrain", "Rain. Turn left, terrain"),
        ("daytime", "After rain, night", "Daytime."),
    ],
)
def test_edited_weather_replaces_the_weather_in_the_description(weather: str, description: str, wanted: str) -> None:
    assert describe_weather(weather, description) == wanted


def test_weather_classes_and_dropped_boxes(scene: Scene) -> None:
    assert edited(scene, weather="night").description == "Night. Parked cars, peds"
    assert {name for frame in edited(scene, classes=["car"]).boxes for name in frame.names} == {"car"}
    assert {token for frame in edited(scene, drop_nearest_cars=1).boxes for token in frame.ids} == {"parked", "walker"}
    left = {token for frame in edited(scene, drop_boxes=0.67).boxes for token in frame.ids}
    assert len(left) == 1
    assert left == {token for frame in edited(scene, drop_boxes=0.67).boxes for token in frame.ids}
    assert not any(frame.ids for frame in edited(scene, drop_boxes=1).boxes)


def test_remove_move_and_replace(scene: Scene) -> None:
    gone = edited(scene, objects=[{"remove": "walk"}])
    assert {token for frame in gone.boxes for token in frame.ids} == {"parked", "ahead"}
    shifted = edited(scene, objects=[{"move": "parked", "by": [2, 1], "turn": 90}])
    for frame in range(F):
        wanted = box(scene, frame, "parked") + np.array([2, 1, 0, 0, 0, 0, -np.pi / 2])
        assert_boxes(box(shifted, frame, "parked"), wanted)
        assert_boxes(box(shifted, frame, "ahead"), box(scene, frame, "ahead"))
    bus = edited(scene, objects=[{"replace": "parked", "with": "bus", "size": [3, 11, 3.6]}])
    wanted = box(scene, 4, "parked").copy()
    wanted[2:6] = wanted[2] + 1, 3, 11, 3.6  # on the same ground
    assert_boxes(box(bus, 4, "parked"), wanted)
    assert bus.boxes[4].names[bus.boxes[4].ids.index("parked")] == "bus"


def test_added_objects_stand_or_move_on_the_ground(scene: Scene) -> None:
    standing = edited(scene, objects=[{"add": "truck", "points": [{"at": [4, 10], "heading": 90}]}])
    for frame in range(F):
        row = box(standing, frame, "added-0")
        wanted = [4, 10 - 6 * frame / 12, -HEIGHT + 2.8 / 2, 2.5, 6.9, 2.8, -3 * np.pi / 2]
        assert_boxes(row, wanted)
    points = [{"at": [0, 5], "second": 0.25}, {"at": [-5, 5], "second": 0.75}]
    crossing = edited(scene, objects=[{"add": "pedestrian", "points": points}])
    there = [frame for frame in range(F) if "added-0" in crossing.boxes[frame].ids]
    assert there == list(range(3, 10))
    for frame in there:
        row = box(crossing, frame, "added-0")
        np.testing.assert_allclose(row[:2], [-10 * (frame / 12 - 0.25), 5 - 6 * frame / 12], atol=1e-5)
        np.testing.assert_allclose(np.cos(-row[6] - np.pi / 2), -1, atol=1e-9)  # heading left


def test_drive_replaces_the_trajectory_of_an_object(scene: Scene) -> None:
    points = [{"at": [0, 12]}, {"at": [0, 12], "second": 1}]
    stopped = edited(scene, objects=[{"drive": "ahead", "points": points}])
    np.testing.assert_allclose([box(stopped, f, "ahead")[1] for f in range(F)], 12 - 6 * np.arange(F) / 12, atol=1e-5)
    np.testing.assert_allclose(box(stopped, 5, "ahead")[3:6], [2, 4.5, 1.6])


def test_a_new_ego_trajectory_moves_boxes_in_the_lidar_frame_only(scene: Scene) -> None:
    stands = edited(scene, ego=[{"at": [0, 0]}])
    np.testing.assert_allclose(stands.ego_to_global, np.tile(scene.ego_to_global[0], (F, 1, 1)), atol=1e-9)
    for frame in range(F):
        assert_boxes(box(stands, frame, "parked"), box(scene, 0, "parked"))
        np.testing.assert_allclose(box(stands, frame, "ahead")[1], 12 + 6 * frame / 12, atol=1e-5)
    left = edited(scene, ego=[{"at": [0, 0]}, {"at": [-4, 0], "second": 1, "heading": 90}])
    lidar = poses.inverse(scene.ego_to_global[0] @ scene.lidar_to_ego[0]) @ left.ego_to_global @ left.lidar_to_ego
    np.testing.assert_allclose(lidar[-1, :3, 3], [-4, 0, 0], atol=1e-6)
    np.testing.assert_allclose(lidar[-1, :3, 1], [-1, 0, 0], atol=1e-6)  # forward is now the old left
    for frame in range(F):  # in the global frame nothing moves
        for token in scene.boxes[frame].ids:
            places = [
                poses.transform(s.ego_to_global[frame] @ s.lidar_to_ego[frame], box(s, frame, token)[:3])
                for s in (scene, left)
            ]
            np.testing.assert_allclose(*places, atol=1e-6)


def test_boxes_survive_the_round_trip_through_the_start_frame(scenes: list[Scene]) -> None:
    scene = scenes[0]
    same = edited(scene, classes=sorted({name for frame in scene.boxes for name in frame.names}))
    for own, frame in zip(same.boxes, scene.boxes, strict=True):
        assert sorted(own.ids) == sorted(frame.ids)
        for token, row in zip(frame.ids, frame.boxes, strict=True):
            assert_boxes(own.boxes[own.ids.index(token)], row)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(-3, 3), st.floats(-3, 3))
def test_transforming_boxes_and_back_is_the_identity(translation: list[float], turn: float, heading: float) -> None:
    matrix = poses.pose([np.cos(turn / 2), 0, 0, np.sin(turn / 2)], translation)
    row = np.array([[1.0, 2, 3, 1, 2, 3, heading]])
    assert_boxes(transform_boxes(transform_boxes(row, matrix), poses.inverse(matrix))[0], row[0])


def test_headings_turn_along_the_shorter_arc() -> None:
    points = [Waypoint(at=(0, 0), heading=170), Waypoint(at=(0, 0), second=1, heading=-170)]
    _, headings = follow(points, np.array([0.5]))
    np.testing.assert_allclose(np.cos(headings), -1, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weather: fog", "weather is 'fog'"),
        ("wether: night", "wether is not a known key; known here: scenes, weather"),
        ("objects: [{replace: a, with: bus, siz: 1}]", "siz is not a known key; known here: replace, with, size"),
        ("drop_boxes: 2", "drop_boxes is 2"),
        ("objects: [{remove: a, move: b}]", "entry 0 must have exactly one of: add, remove, move, replace, drive"),
        ("objects: [{move: a}, {add: tank, points: [{at: [0, 0]}]}]", r"entry 1 \(add\): add is 'tank'"),
        ("objects: [{add: car, points: []}]", r"entry 0 \(add\): points"),
        ("objects: [{add: car, points: [{at: [0, 0], second: 2}, {at: [1, 1], second: 1}]}]", "must rise"),
        ("objects: [{add: car, size: [0, 1, 1], points: [{at: [0, 0]}]}]", "size.0 is 0"),
        ("ego: [{at: [0]}]", "ego.0.at"),
        ("ego: [{at: [0, 0], sekond: 1}]", "ego.0.sekond is not a known key"),
        ("objects: {", "not valid YAML"),
    ],
)
def test_invalid_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "edits.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_edits(path)
    assert "edits.yaml" in error.value.message
    assert "\n" not in error.value.message


def test_unknown_and_ambiguous_objects_are_refused(scene: Scene) -> None:
    with pytest.raises(UsageError, match="entry 1: no object matches 'bike' in scene-0001") as error:
        edited(scene, objects=[{"remove": "walker"}, {"remove": "bike"}])
    assert "preview-edits" in error.value.hint
    twice = replace(
        scene, boxes=[FrameBoxes([f"car-{n}" for n in range(len(f.ids))], f.names, f.boxes) for f in scene.boxes]
    )
    with pytest.raises(UsageError, match="3 objects match 'car-'"):
        edited(twice, objects=[{"remove": "car-"}])


def test_an_empty_file_changes_nothing(tmp_path: Path, scene: Scene) -> None:
    (tmp_path / "edits.yaml").write_text("")
    assert edit_scene(scene, load_edits(tmp_path / "edits.yaml")) is scene
