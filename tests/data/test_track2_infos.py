"""The W-CODA track-2 evaluation file in the published format (golden notes, section 3), written field by field."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from magicdrive_core.cli.main import app
from magicdrive_core.data.clips import list_clips
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.published_infos import CAMERA_ORDER
from magicdrive_core.data.records import Scene
from magicdrive_core.geometry.cameras import VIEWS
from tests.conftest import PROJECT

FRAMES = 17  # of each scene, the first ones, from which the clips of a submission are generated
TURN = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera axes to lidar axes
SCENES = ("a" * 32, "b" * 32)
PREFIX = "/home/someone/data/nuscenes/"


def record(scene: int, frame: int) -> dict[str, Any]:
    """Make one frame: the ego car drives along the global x at 6 m/s, past a car and an object of no known class."""
    key, step = divmod(frame, 6)
    token = f"{SCENES[scene][:-1]}{key}" + (str(step) if step else "")
    second = frame / 12
    cameras = {
        name: {
            "data_path": f"{PREFIX}{'sweeps' if step else 'samples'}/{name}/{scene}-{frame}.jpg",
            "type": name,
            "sample_data_token": f"{name}-{frame}",
            "sensor2ego_translation": [1.5, 0.0, 1.5],
            "sensor2ego_rotation": [0.5, -0.5, 0.5, -0.5],
            "ego2global_translation": [100 + 6 * second, 50.0, 0.0],
            "ego2global_rotation": [1.0, 0.0, 0.0, 0.0],
            "timestamp": 1_533_000_000_000_000 + round(second * 1e6) + 4000 * index,
            "sensor2lidar_rotation": TURN,
            "sensor2lidar_translation": np.array([0.1 * index, 0.5, -0.3]),
            "camera_intrinsics": np.array([[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]]),
        }
        for index, name in enumerate(CAMERA_ORDER)
    }
    return {
        "lidar_path": f"{PREFIX}samples/LIDAR_TOP/{scene}-{frame}.bin",
        "token": token,
        "sweeps": [],
        "cams": cameras,
        "lidar2ego_translation": [0.9, 0.0, 1.8],
        "lidar2ego_rotation": [0.7071067811865476, 0.0, 0.0, -0.7071067811865476],
        "ego2global_translation": [100 + 6 * second, 50.0, 0.0],
        "ego2global_rotation": [1.0, 0.0, 0.0, 0.0],
        "timestamp": 1_533_000_000_000_000 + round(second * 1e6),
        "location": "singapore-queenstown",
        "description": ("Parked cars, peds", "Night, rain")[scene],
        "timeofday": "2018-08-01-15-16-36-0400",
        "is_key_frame": True,
        "ego_velocity": np.array([6.0, 0.0, 0.0]),
        "gt_boxes": np.array([[2.0, 20 - 6 * second, -1, 1.9, 4.5, 1.6, -1.57], [5, 5, -1, 0.4, 0.4, 1.0, 0]]),
        "gt_box_ids": np.array([f"car-{scene}", f"animal-{scene}"]),
        "gt_names": np.array(["car", "animal"]),
        "gt_velocity": np.array([[np.nan, np.nan], [0.0, 0.0]]),
        "num_lidar_pts": np.array([12, 0]),
        "num_radar_pts": np.array([0, 0]),
        "visibility": np.array([4, 1], np.uint8),
        "valid_flag": np.array([True, False]),
    }


@pytest.fixture(params=["numpy.core", "numpy._core"], ids=["NumPy 1", "NumPy 2"])
def pickled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write the file as NumPy 1 or 2 writes it; protocol 2 spells out module names."""
    infos = [record(scene, frame) for scene in range(2) for frame in range(FRAMES)]
    tokens = [[info["token"] for info in infos[start : start + FRAMES]] for start in (0, FRAMES)]
    values = {"infos": infos[::-1], "metadata": {"version": "v1.0-trainval"}, "scene_tokens": tokens}
    data = pickle.dumps(values, protocol=2)
    for core in (b"numpy._core.", b"numpy.core."):
        data = data.replace(b"c" + core, b"c" + request.param.encode() + b".")
    path = tmp_path / "nuscenes_interp_12Hz_infos_track2_eval.pkl"
    path.write_bytes(data)
    assert b"c" + request.param.encode() + b".multiarray" in data
    return path


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def check(scenes: list[Scene]) -> None:
    assert [len(scene) for scene in scenes] == [FRAMES, FRAMES]
    for number, scene in enumerate(scenes):
        assert scene.split == "val"
        assert scene.token == scene.tokens[0] == f"{SCENES[number][:-1]}0"
        assert scene.description == ("Parked cars, peds", "Night, rain")[number]
        assert scene.key_frames.nonzero()[0].tolist() == [0, 6, 12]
        assert scene.pictures[7] == [f"sweeps/{view}/{number}-7.jpg" for view in VIEWS]
        indices = [CAMERA_ORDER.index(view) for view in VIEWS]
        np.testing.assert_allclose(scene.camera_to_lidar[7, :, :3, 3], [[0.1 * index, 0.5, -0.3] for index in indices])
        np.testing.assert_allclose(scene.camera_to_lidar[7, 3, :3, :3], TURN)
        np.testing.assert_allclose(scene.ego_to_global[12, :3, 3], [106, 50, 0])
        np.testing.assert_allclose(scene.lidar_to_ego[3, :3, :3], [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-12)
        for frame, boxes in enumerate(scene.boxes):
            assert (boxes.ids, boxes.names) == ([f"car-{number}"], ["car"])
            np.testing.assert_allclose(boxes.boxes, [[2, 20 - frame / 2, -1, 1.9, 4.5, 1.6, -1.57]])


def test_the_file_is_imported_and_exported(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((PROJECT / "profiles/demo.yaml").read_text())
    assert "2 scenes in" in run("import-infos", "--val", pickled.name)
    check(read_scenes("artifacts/infos"))
    assert json.loads(Path("artifacts/infos/infos.json").read_text())["boxes"]["car"] == 2 * FRAMES
    clips = list_clips(read_scenes("artifacts/infos"), "val", FRAMES, 1)
    assert [(clip.start, clip.frames) for clip in clips] == [(0, FRAMES), (0, FRAMES)]
    run("export-infos", "again.pkl")
    run("import-infos", "--val", "again.pkl")
    check(read_scenes("artifacts/infos"))


def test_code_in_the_file_is_refused_unrun(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((PROJECT / "profiles/demo.yaml").read_text())
    whole = pickled.read_bytes()
    assert whole.count(b"X\x07\x00\x00\x00version") == 1  # its value becomes os.mkdir("trace")
    call = b"cos\nmkdir\n(X\x05\x00\x00\x00tracetR"
    pickled.write_bytes(whole.replace(b"X\r\x00\x00\x00v1.0-trainval", call))
    result = CliRunner().invoke(app, ["import-infos", "--val", pickled.name])
    assert "is refused: it asks for os.mkdir, which is not a plain data type" in str(result.exception)
    assert not Path("trace").exists()
    assert not Path("artifacts").exists()
