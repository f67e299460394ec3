"""The Argoverse 2 adapter: a log becomes a scene with the geometry of the log's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.feather as feather
import pytest
import yaml
from typer.testing import CliRunner

from magicdrive_core.cli.main import app
from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.argoverse import CAMERAS
from magicdrive_core.data.conditions import build_conditions
from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.map_cache import read_map
from magicdrive_core.data.pictures import read_clip
from magicdrive_core.data.records import MAP_LAYERS, Clip, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import full_window, project
from tests.conftest import PROJECT
from tests.data.argoverse_log import FOCAL, LOG, PARKED, START, WALK, WALKER, camera_pose, ego_pose, size_of, write_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "argoverse")


@pytest.fixture
def config(log: Path) -> Config:
    values = yaml.safe_load((PROJECT / "profiles/demo.yaml").read_text())
    values["data"] = {"format": "argoverse2", "root": str(log.parents[1]), "version": "val"}
    values["conditions"] = {"map_cells": {"80x144": 100, "96x176": 100}}  # cells of one metre
    return parse_config(values)


def read(config: Config) -> Scene:
    return open_adapter(config).read(LOG, "both")


def test_frames_are_12_hz_and_objects_at_their_logged_positions(config: Config) -> None:
    scene = read(config)
    assert len(scene) == 37
    assert scene.key_frames.sum() == 7
    np.testing.assert_allclose(np.diff(scene.timestamps), 1e6 / 12, atol=1)
    assert scene.location == "PIT"
    seconds = (scene.timestamps - scene.timestamps[0]) / 1e6
    for frame, boxes in enumerate(scene.boxes):
        assert dict(zip(boxes.ids, boxes.names, strict=True)) == {"parked": "car", "walker": "pedestrian"}
        there = poses.transform(scene.ego_to_global[frame] @ scene.lidar_to_ego[frame], boxes.boxes[:, :3])
        wanted = {"parked": PARKED, "walker": WALKER + seconds[frame] * WALK}
        for token, centre in zip(boxes.ids, there, strict=True):
            np.testing.assert_allclose(centre, wanted[token] + [0, 0, 10], atol=2e-3)
        np.testing.assert_allclose(boxes.boxes[boxes.ids.index("parked"), 3:6], [1.9, 4.5, 1.6])
    np.testing.assert_allclose(scene.boxes[0].boxes[0, 0], -4, atol=1e-6)  # four metres to the left; x is to the right
    assert scene.boxes[0].boxes[0, 1] > 15  # ahead: y is forward


def test_points_project_as_by_the_calibration_of_the_log(config: Config) -> None:
    scene, start = read(config), 315_966_000_000_000
    for frame in (0, 7, 20):
        for view, camera in enumerate(CAMERAS):
            taken = (int(Path(scene.pictures[frame][view]).stem) // 1000 - start) / 1e6
            assert abs(taken - (scene.timestamps[frame] - start) / 1e6) <= 0.0251
            to_global = ego_pose(taken) @ camera_pose(camera)
            point = poses.transform(to_global, np.array([1.0, -0.5, 12.0]))
            width, height = size_of(camera)
            pixel = FOCAL * np.array([1.0, -0.5]) / 12 + [width / 2 + 3, height / 2 - 5]
            left, top, right, _ = full_window(width, height)
            wanted = (pixel - [left, top]) * 1600 / (right - left)
            lidar_to_global = scene.ego_to_global[frame] @ scene.lidar_to_ego[frame]
            here = poses.transform(poses.inverse(lidar_to_global @ scene.camera_to_lidar[frame, view]), point)
            seen, depth = project(here, scene.intrinsics[frame, view])
            np.testing.assert_allclose(seen, wanted, atol=0.05)
            np.testing.assert_allclose(depth, 12, atol=1e-3)


def test_infos_maps_and_pictures_are_made_from_a_log(config: Config, tmp_path: Path) -> None:
    build_infos(config, tmp_path / "infos")
    (scene,) = read_scenes(tmp_path / "infos")
    assert json.loads((tmp_path / "infos/infos.json").read_text())["pictures"] == len(
        {path for views in scene.pictures for path in views}
    )
    build_conditions(config, tmp_path / "infos", tmp_path / "conditions")
    bits = read_map(tmp_path / "conditions", scene.token, 100)
    lidar = (scene.ego_to_global @ scene.lidar_to_ego)[0, :2, 3]

    def at(x: float, y: float) -> set[str]:
        right, forward = -(y - lidar[1]), x - lidar[0]  # the ego car looks along the x axis of the city
        cell = bits[0, int(50 + right), int(50 + forward)]
        return {name for layer, name in enumerate(MAP_LAYERS) if cell >> layer & 1}

    assert at(1012, 2005) == {"drivable_area", "ped_crossing"}
    assert at(1020, 2000) >= {"drivable_area", "road_divider"}
    assert at(1020, 1996) >= {"drivable_area", "lane_divider"}
    assert at(1020, 2006) == {"drivable_area"}
    assert at(1020, 2020) == set()
    assert read_clip(config.data.root, scene, Clip(scene.token, 0, 1), "80x144").shape == (6, 1, 80, 144, 3)


def test_commands_prepare_a_log(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(PROJECT / "profiles/demo.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    settings = {"synth": "null", "data.format": "argoverse2", "data.root": log.parents[1], "data.version": "val"}
    words = [word for key, value in settings.items() for word in ("-S", f"{key}={value}")]
    for verb in ("infos", "conditions"):
        result = CliRunner().invoke(app, [verb, *words])
        assert result.exit_code == 0, result.output
    (scene,) = read_scenes("artifacts/infos")
    assert scene.name == LOG
    assert read_map("artifacts/conditions", scene.token, 72).shape == (37, 72, 72)
    assert json.loads(Path("artifacts/conditions/clips.json").read_text())["train"]["80x144"]["17"] == 2


def test_a_changed_log_changes_the_digest(config: Config, log: Path) -> None:
    adapter = open_adapter(config)
    before = adapter.digest(), adapter.map_digest()
    (log / "map" / next(file.name for file in (log / "map").iterdir())).write_text("{}")
    assert adapter.digest() == before[0]
    assert adapter.map_digest() != before[1]
    next((log / "sensors/cameras/ring_front_left").iterdir()).unlink()
    assert adapter.digest() != before[0]


def test_skip_bad_leaves_out_a_log_with_a_broken_map(config: Config, log: Path, tmp_path: Path) -> None:
    other = write_log(tmp_path / "argoverse", log="1a")
    (path,) = (log / "map").iterdir()
    path.write_text(path.read_text()[:-9])
    with pytest.raises(MagicDriveError, match=rf"{path.name} is not valid JSON: .*line 1 column \d+"):
        build_infos(config, tmp_path / "infos")
    build_infos(
        config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": True})}), tmp_path / "infos"
    )
    assert [scene.name for scene in read_scenes(tmp_path / "infos")] == [other.name]
    (reason,) = json.loads((tmp_path / "infos/infos.json").read_text())["quarantined"].items()
    assert reason[0] == LOG
    assert f"{path} is not valid JSON" in reason[1]


Change = Callable[[Path], object]


def without(column: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "annotations.feather"
        feather.write_feather(feather.read_table(path, memory_map=False).drop([column]), path)

    return change


def with_value(file: str, column: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        table = feather.read_table(folder / file, memory_map=False)
        values = table.column(column).to_pylist()
        values[4] = value
        feather.write_feather(table.set_column(table.column_names.index(column), column, [values]), folder / file)

    return change


def cut(file: str, column: str, first: int, last: int) -> Change:
    """Remove the rows whose value is from first up to last."""

    def change(folder: Path) -> None:
        table = feather.read_table(folder / file, memory_map=False)
        values = np.array(table.column(column))
        feather.write_feather(table.filter((values < first) | (values >= last)), folder / file)

    return change


def silent(camera: str) -> Change:
    """Remove the pictures of one second."""

    def change(folder: Path) -> None:
        for path in (folder / "sensors/cameras" / camera).iterdir():
            if START + 1_000_000_000 <= int(path.stem) < START + 2_000_000_000:
                path.unlink()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda log: (log / "annotations.feather").write_bytes(b"ARROW1"), "annotations.feather cannot be read"),
        (lambda log: (log / "calibration/intrinsics.feather").unlink(), "intrinsics.feather is missing"),
        (without("qw"), "annotations.feather has no column qw"),
        (with_value("annotations.feather", "length_m", 0.0), "annotations.feather: the size in row 4 is not positive"),
        (
            with_value("city_SE3_egovehicle.feather", "tx_m", float("nan")),
            "city_SE3_egovehicle.feather: the translation in row 4 is not finite",
        ),
        (
            with_value("city_SE3_egovehicle.feather", "qw", 1e300),
            "city_SE3_egovehicle.feather: the rotation in row 4 is not a quaternion of length 1",
        ),
        (
            with_value("city_SE3_egovehicle.feather", "timestamp_ns", 315_966_000_030_000_000),
            r"city_SE3_egovehicle.feather: timestamp_ns in row \d is not later than that of the previous one",
        ),
        (
            with_value("annotations.feather", "track_uuid", "parked"),
            "annotations.feather: an object is twice in the sweep",
        ),
        (with_value("annotations.feather", "category", None), "column category holds string with 1 nulls, not texts"),
        (with_value("calibration/intrinsics.feather", "fx_px", 0.0), "is not a matrix .* of a pinhole camera"),
        (with_value("calibration/intrinsics.feather", "width_px", 0), "a picture has an impossible size"),
        (
            cut("city_SE3_egovehicle.feather", "timestamp_ns", START + 2_000_000_000, START * 2),
            r"city_SE3_egovehicle.feather ends 1\.\d\d s from a sweep or picture",
        ),
        (
            cut("city_SE3_egovehicle.feather", "timestamp_ns", START + 1_000_000_000, START + 2_000_000_000),
            r"city_SE3_egovehicle.feather has no record near .* the nearest is 0\.\d\d s away",
        ),
        (
            cut("annotations.feather", "timestamp_ns", START + 1_000_000_000, START + 1_000_000_001),
            r"annotations.feather has no sweep near 315966001000000000: the nearest is 0\.10 s away",
        ),
        (silent("ring_side_left"), r"ring_side_left has no record near \d+: the nearest is 0\.\d\d s away"),
        (lambda log: next((log / "map").iterdir()).unlink(), "holds no log_map_archive"),
    ],
)
def test_unusable_logs_are_named(config: Config, log: Path, change: Change, message: str) -> None:
    change(log)
    with pytest.raises(MagicDriveError, match=message):
        read(config)


def test_a_lost_sweep_between_key_frames_shifts_nothing(config: Config, log: Path) -> None:
    whole = read(config)
    cut("annotations.feather", "timestamp_ns", START + 700_000_000, START + 700_000_001)(log)
    lost = read(config)
    np.testing.assert_array_equal(lost.timestamps, whole.timestamps)
    assert lost.tokens == whole.tokens


@pytest.mark.parametrize("value", [float("nan"), 1e300, "5", None])
def test_a_map_with_an_impossible_point_is_refused(config: Config, log: Path, value: Any) -> None:
    path = next((log / "map").iterdir())
    values = json.loads(path.read_text())
    values["drivable_areas"]["1"]["area_boundary"][2]["x"] = value
    path.write_text(json.dumps(values))
    with pytest.raises(MagicDriveError, match=rf"{path.name}.*(area_boundary of the shape 1)"):
        open_adapter(config).vector_map(read(config))


def test_files_that_a_mac_leaves_beside_pictures_are_no_pictures(config: Config, log: Path) -> None:
    whole = read(config)
    (log / "sensors/cameras/ring_side_left/._315966000003000000.jpg").write_bytes(b"\0\5\x16\7")
    assert read(config).pictures == whole.pictures
