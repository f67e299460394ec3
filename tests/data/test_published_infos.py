"""Published info files: the round trip of scenes, refused types, and messages about broken files."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nuscenes.nuscenes import NuScenes
from typer.testing import CliRunner

from magicdrive_core.cli.main import app
from magicdrive_core.data.infos import import_infos, read_scenes
from magicdrive_core.data.nuscenes_scenes import build_scene
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.data.plain_pickle import read_plain_pickle
from magicdrive_core.data.published_infos import read_published, write_published
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses


def assert_same(read: Scene, scene: Scene) -> None:
    assert (read.location, read.description, read.tokens) == (scene.location, scene.description, scene.tokens)
    assert read.pictures == scene.pictures
    np.testing.assert_array_equal(read.key_frames, scene.key_frames)
    np.testing.assert_array_equal(read.timestamps, scene.timestamps)
    for field in ("lidar_to_ego", "ego_to_global", "intrinsics", "camera_to_lidar"):
        np.testing.assert_allclose(getattr(read, field), getattr(scene, field), rtol=0, atol=1e-9)
    for own, frame in zip(read.boxes, scene.boxes, strict=True):
        assert (own.ids, own.names) == (frame.ids, frame.names)
        np.testing.assert_array_equal(own.boxes, frame.boxes)


def test_scenes_survive_the_round_trip(scenes: list[Scene], tmp_path: Path) -> None:
    write_published(scenes, tmp_path / "infos.pkl", "v1.0-demo")
    for read, scene in zip(read_published(tmp_path / "infos.pkl", "val"), scenes, strict=True):
        assert_same(read, scene)
        assert (read.token, read.name, read.split) == (scene.tokens[0], scene.tokens[0], "val")
    first = (tmp_path / "infos.pkl").read_bytes()
    write_published(scenes, tmp_path / "infos.pkl", "v1.0-demo")
    assert (tmp_path / "infos.pkl").read_bytes() == first


def test_a_real_drive_has_the_published_fields(shared: Path, tmp_path: Path) -> None:
    tables = load_tables(shared / "data/nuscenes-drive", "v1.0-drive")
    scene = build_scene(tables, tables.scene[0], "val", published=True)
    write_published([scene], tmp_path / "infos.pkl", "v1.0-drive")
    assert_same(read_published(tmp_path / "infos.pkl", "val")[0], scene)
    values = pickle.loads((tmp_path / "infos.pkl").read_bytes())
    assert values["scene_tokens"] == [scene.tokens]
    record = values["infos"][7]
    assert list(record["cams"]) == [
        *("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
    ]
    count = len(scene.boxes[7].ids)
    assert record["gt_boxes"].shape == (count, 7)
    assert record["gt_velocity"].shape == (count, 2)
    assert record["is_key_frame"]
    for camera in record["cams"].values():  # both transformations from camera to lidar agree
        to_global = poses.pose(camera["ego2global_rotation"], camera["ego2global_translation"]) @ poses.pose(
            camera["sensor2ego_rotation"], camera["sensor2ego_translation"]
        )
        lidar = poses.pose(record["ego2global_rotation"], record["ego2global_translation"]) @ poses.pose(
            record["lidar2ego_rotation"], record["lidar2ego_translation"]
        )
        straight = poses.pose(camera["sensor2lidar_rotation"], camera["sensor2lidar_translation"])
        np.testing.assert_allclose(poses.inverse(lidar) @ to_global, straight, atol=1e-9)


def test_velocities_match_those_of_the_annotations(shared: Path, tmp_path: Path) -> None:
    tables = load_tables(shared / "data/nuscenes-drive", "v1.0-drive")
    scene = build_scene(tables, tables.scene[0], "val", published=False)
    write_published([scene], tmp_path / "infos.pkl", "v1.0-drive")
    record = pickle.loads((tmp_path / "infos.pkl").read_bytes())["infos"][60]
    lidar_to_global = scene.ego_to_global[60] @ scene.lidar_to_ego[60]
    devkit = NuScenes("v1.0-drive", str(shared / "data/nuscenes-drive"), verbose=False)
    differences = []
    for token in (token for token in devkit.get("sample", scene.tokens[60])["anns"]):
        annotation = devkit.get("sample_annotation", token)
        if annotation["instance_token"] in record["gt_box_ids"]:
            row = list(record["gt_box_ids"]).index(annotation["instance_token"])
            wanted = (lidar_to_global[:3, :3].T @ devkit.box_velocity(token))[:2]
            differences.append(np.linalg.norm(record["gt_velocity"][row] - wanted))
    assert len(differences) > 20
    assert np.nanmedian(differences) < 0.2  # the devkit's span a second, these a sixth of one


class Malicious:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval, __import__, getattr, pickle.loads])
def test_types_other_than_data_are_refused_and_not_run(tmp_path: Path, protocol: int, function: Any) -> None:
    argument = str(tmp_path / "trace") if function is os.mkdir else "1"
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps({"infos": [Malicious(function, argument)]}, protocol=protocol))
    with pytest.raises(MagicDriveError, match=r"infos.pkl is refused: it asks for .*, which is not a plain data type"):
        read_plain_pickle(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_data_of_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    values = {
        "float": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.eye(3, dtype=np.float32)),
        "words": np.array(["car", "bus"]),
        "objects": np.array(["car", None], dtype=object),
        "scalar": np.float32(0.5),
        "bytes": b"\x00\xff",
        "set": {1, 2},
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, protocol=protocol))
    read = read_plain_pickle(tmp_path / "a.pkl")
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    whole = pickle.dumps({"a": np.arange(100)})
    for broken in (b"", whole[: len(whole) // 2], b"not a pickle"):
        path.write_bytes(broken)
        with pytest.raises(MagicDriveError, match=r"a.pkl is not a complete pickle"):
            read_plain_pickle(path)
    with pytest.raises(MagicDriveError, match="is missing"):
        read_plain_pickle(tmp_path / "b.pkl")


def proto(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def integer(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


HOSTILE = {
    "bytearray of 8 GB": proto(b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R"),
    "memo of 64 GB": proto(b"Nr\xff\xff\xff\xff"),
    "ndarray called": proto(b"cnumpy\nndarray\n" + integer(2**31 - 1) + b"\x85R"),
    "dtype with pointers to names": proto(
        b"cnumpy\ndtype\n\x8c\x02O8K\x00K\x01\x87R(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01aK\x05sJ\x08\x00\x00\x00K\x08K\x3ftb"
    ),
    "array of file bytes as objects": proto(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
        b"(K\x01K\x01\x85cnumpy\ndtype\n\x8c\x02O8K\x00K\x01\x87R\x89C\x08AAAAAAAAtb"
    ),
    "array larger than its bytes": proto(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
        b"(K\x01" + integer(2**30) + b"\x85cnumpy\ndtype\n\x8c\x02f8K\x00K\x01\x87R\x89C\x08AAAAAAAAtb"
    ),
    "dtype of fields": proto(b"cnumpy\ndtype\n\x8c\x05f8,O8\x85R"),
    "text of a billion letters": proto(b"cnumpy\ndtype\n\x8c\x0bU1000000000\x85R"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
def test_a_few_bytes_neither_crash_nor_take_the_memory(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MagicDriveError, match=r"a.pkl is not a complete pickle"):
        read_plain_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # kB
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@given(st.data())
def test_a_changed_pickle_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(["car", None], object), "c": np.float32(1), "d": {1}}
    whole = bytearray(pickle.dumps(values, protocol=data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("pickle") / "a.pkl"
    path.write_bytes(whole)
    with contextlib.suppress(MagicDriveError):
        read_plain_pickle(path)


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        target: Any = values
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("scene_tokens"), "lacks infos or scene_tokens"),
        (drop("infos", 3), "scene_tokens names the frame"),
        (drop("infos", 2, "gt_boxes"), r"frame \w+ has no gt_boxes"),
        (drop("infos", 2, "cams", "CAM_BACK"), r"frame \w+ has no CAM_BACK"),
        (drop("infos", 2, "cams", "CAM_BACK", "data_path"), r"CAM_BACK of frame \w+ has no data_path"),
        (lambda v: v["infos"][1].update(gt_names=["car"]), "differ in length"),
        (lambda v: v["infos"][1].update(lidar2ego_rotation=[0, float("nan"), 0, 1]), "lidar2ego_rotation of frame"),
        (lambda v: v["infos"][1]["gt_boxes"].__setitem__((0, 4), 0.0), "a size that is not positive"),
        (lambda v: v["infos"][1].update(gt_boxes=np.zeros((2, 9))), "gt_boxes of frame"),
        (lambda v: v.update(infos=None), "is not a list of records"),
        (lambda v: v["infos"].__setitem__(0, None), "is not a list of records"),
        (lambda v: v["infos"][0].update(token=[]), "has the token"),
        (lambda v: v["infos"].append(v["infos"][0]), "two frames have the token"),
        (lambda v: v.update(scene_tokens=[3]), "scene_tokens is not a list of lists of tokens"),
        (lambda v: v["infos"][1].update(timestamp="noon"), "timestamp of frame .* is 'noon'"),
        (
            lambda v: v["infos"][1].update(timestamp=v["infos"][0]["timestamp"]),
            "is not later than that of the prev",
        ),
        (
            lambda v: v["infos"][1].update(timestamp=v["infos"][3]["timestamp"]),
            "is not later than that of the prev",
        ),
        (lambda v: v["infos"][1].update(ego2global_rotation=[1e-200, 0, 0, 0]), "ego2global_rotation of frame"),
        (lambda v: v["infos"][1].update(ego2global_translation=[1e300, 0, 0]), "is not finite or farther"),
        (lambda v: v["infos"][1].update(description=None), "description of frame .* is None, expected a text"),
        (lambda v: v["infos"][1].update(gt_names=3, gt_box_ids=None), "gt_box_ids of frame"),
        (lambda v: v["infos"][1]["cams"]["CAM_BACK"].update(camera_intrinsics=np.zeros((3, 3))), "a pinhole camera"),
        (lambda v: v["infos"][1]["cams"]["CAM_BACK"].update(camera_intrinsics=[]), "camera_intrinsics of CAM_BACK"),
        (
            lambda v: v["infos"][1]["cams"]["CAM_BACK"].update(data_path="samples/../../a"),
            "not a path below the data",
        ),
    ],
)
def test_broken_records_are_named(scenes: list[Scene], tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "infos.pkl"
    write_published(scenes[:1], path, "v1.0-demo")
    values = pickle.loads(path.read_bytes())
    change(values)
    path.write_bytes(pickle.dumps(values))
    with pytest.raises(MagicDriveError, match=message):
        import_infos({"val": path}, tmp_path, "v1.0-demo", tmp_path / "infos")
    assert not (tmp_path / "infos").exists()


def test_commands_export_and_import_infos(
    infos: Path, scenes: list[Scene], synthetic_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/infos").symlink_to(infos)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        result = CliRunner().invoke(app, ["export-infos", f"{split}.pkl", "--split", split])
        assert result.exit_code == 0, result.output
    files = {"train": tmp_path / "train.pkl", "val": tmp_path / "val.pkl"}
    assert import_infos(files, synthetic_root, "v1.0-demo", tmp_path / "again") == 2
    for read, scene in zip(read_scenes(tmp_path / "again"), scenes, strict=True):
        assert (read.token, read.name, read.split) == (scene.token, scene.name, scene.split)
        assert_same(read, scene)
    facts = json.loads((tmp_path / "again/infos.json").read_text())
    assert facts["rule"] == "imported from train.pkl and val.pkl"
    assert facts["frames"] == sum(map(len, scenes))
