"""Broken records are named with file, record and field; ``data.skip_bad`` leaves out only their scenes."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicdrive_core.data import nuscenes_files
from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError

NAN = float("nan")


class Broken:
    """The tables of one scene, to break a single record."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.changed: set[str] = set()
        names = ("scene", "sample", "sample_data", "ego_pose", "sample_annotation")
        self.tables = {table: json.loads((root / f"v1.0-demo/{table}.json").read_text()) for table in names}
        (self.scene,) = (scene["token"] for scene in self.tables["scene"] if scene["name"] == name)

    def records(self, table: str) -> list[dict[str, Any]]:
        """List records of the scene: samples, annotations, sensor records of a camera in order, or their poses."""
        samples = {record["token"] for record in self.tables["sample"] if record["scene_token"] == self.scene}
        if table == "sample":
            return sorted((r for r in self.tables["sample"] if r["token"] in samples), key=lambda r: r["timestamp"])
        if table == "sample_annotation":
            return [record for record in self.tables[table] if record["sample_token"] in samples]
        shots = (
            r for r in self.tables["sample_data"] if r["sample_token"] in samples and "/CAM_BACK/" in r["filename"]
        )
        in_order = sorted(shots, key=lambda record: record["timestamp"])
        if table == "sample_data":
            return in_order
        poses = {record["token"]: record for record in self.tables["ego_pose"]}
        return [poses[record["ego_pose_token"]] for record in in_order]

    def set(self, table: str, row: int, field: str, value: Any) -> str:
        record = self.records(table)[row]
        record[field] = value
        self.changed.add(table)
        return record["token"]

    def remove(self, table: str, row: int) -> str:
        record = self.records(table)[row]
        self.tables[table].remove(record)
        self.changed.add(table)
        return record["token"]

    def double(self, table: str, row: int, **fields: Any) -> str:
        """Add a record with the token of another, which may differ in some fields."""
        record = self.records(table)[row]
        self.tables[table].append(record | fields)
        self.changed.add(table)
        return record["token"]

    def edit_scene(self, **fields: Any) -> str:
        next(record for record in self.tables["scene"] if record["token"] == self.scene).update(fields)
        self.changed.add("scene")
        return self.scene

    def begin_late(self) -> str:
        """Let the chain begin at the second key frame."""
        return self.edit_scene(first_sample_token=self.records("sample")[1]["token"])

    def forget_first(self) -> str:
        """Let scene and chain begin at the second key frame; the first one still names the scene."""
        self.begin_late()
        self.edit_scene(nbr_samples=len(self.records("sample")) - 1)
        self.set("sample", 1, "prev", "")
        return self.scene

    def silence(self, first: float, last: float) -> str:
        """Remove the sweeps of a camera between two times in seconds; key frames stay."""
        records = self.records("sample_data")
        begin = records[0]["timestamp"]
        gone = [r for r in records if not r["is_key_frame"] and first < (r["timestamp"] - begin) / 1e6 < last]
        left = [record for record in records if record not in gone]
        for before, after in pairwise(left):
            before["next"], after["prev"] = after["token"], before["token"]
        self.tables["sample_data"] = [record for record in self.tables["sample_data"] if record not in gone]
        self.changed.add("sample_data")
        return "CAM_BACK"

    def swap_times(self, table: str, row: int) -> str:
        first, second = self.records(table)[row : row + 2]
        first["timestamp"], second["timestamp"] = second["timestamp"], first["timestamp"]
        self.changed.add(table)
        return second["token"]

    def write(self) -> None:
        for table in self.changed:
            (self.root / f"v1.0-demo/{table}.json").write_text(json.dumps(self.tables[table]))


CASES = {
    "no key frame": (
        lambda b: b.remove("sample", 1),
        r"sample.json has no record '{0}', which \w+ of record \w+ in \w+.json names",
    ),
    "no first key frame": (
        lambda b: b.remove("sample", 0),
        r"sample.json has no record '{0}', which \w+ of record \w+ in \w+.json names",
    ),
    "no pose": (
        lambda b: b.remove("ego_pose", 3),
        r"ego_pose.json has no record '{0}', which ego_pose_token of record \w+ in sample_data.json names",
    ),
    "no sweep": (
        lambda b: b.remove("sample_data", 2),
        r"sample_data.json has no record '{0}', which (next|prev) of record \w+ in sample_data.json names",
    ),
    "no annotation": (
        lambda b: b.remove("sample_annotation", 5),
        r"sample_annotation.json has no record '{0}', which (next|prev) of record \w+ in sample_annotation.json names",
    ),
    "sweep of no sample": (
        lambda b: b.set("sample_data", 2, "sample_token", "gone"),
        r"sample.json has no record 'gone', which sample_token of record {0} in sample_data.json names",
    ),
    "no instance": (
        lambda b: b.set("sample_annotation", 5, "instance_token", "gone"),
        r"instance.json has no record 'gone', which instance_token of record {0} in sample_annotation.json names",
    ),
    "no calibration": (
        lambda b: b.set("sample_data", 1, "calibrated_sensor_token", "gone"),
        r"calibrated_sensor.json has no record 'gone', which calibrated_sensor_token of record {0} in sample_data.json",
    ),
    "unsorted key frames": (
        lambda b: b.swap_times("sample", 1),
        r"sample.json: timestamp of record {0} is not later than that of \w+",
    ),
    "unsorted sweeps": (
        lambda b: b.swap_times("sample_data", 4),
        r"sample_data.json: timestamp of record {0} is not later than that of \w+",
    ),
    "no time": (
        lambda b: b.set("sample_data", 4, "timestamp", "noon"),
        r"sample_data.json: timestamp of record {0} is 'noon', expected integer microseconds",
    ),
    "NaN in a position": (
        lambda b: b.set("ego_pose", 2, "translation", [NAN, 0.0, 0.0]),
        r"ego_pose.json: translation of record {0} is not 3 finite numbers",
    ),
    "NaN in a rotation": (
        lambda b: b.set("ego_pose", 2, "rotation", [1.0, 0.0, 0.0, NAN]),
        r"ego_pose.json: rotation of record {0} is not 4 finite numbers",
    ),
    "box of no size": (
        lambda b: b.set("sample_annotation", 5, "size", [0.0, 4.0, 1.5]),
        r"sample_annotation.json: size of record {0} is not positive",
    ),
    "annotation that stands twice": (
        lambda b: b.double("sample_annotation", 5),
        r"sample_annotation.json: several records have the token '{0}'",
    ),
    "two annotations of one token": (
        lambda b: b.double("sample_annotation", 5, size=[1.0, 2.0, 3.0]),
        r"sample_annotation.json: several records have the token '{0}'",
    ),
    "object twice in a key frame": (
        lambda b: b.double("sample_annotation", 5, token="again") and "again",
        r"sample_annotation.json: instance_token of record {0} is twice in the sample \w+",
    ),
    "sweep that stands twice": (
        lambda b: b.double("sample_data", 2),
        r"sample_data.json: several records have the token '{0}'",
    ),
    "pose that stands twice": (
        lambda b: b.double("ego_pose", 2),
        r"ego_pose.json: several records have the token '{0}'",
    ),
    "key frame that stands twice": (
        lambda b: b.double("sample", 1),
        r"sample.json: several records have the token '{0}', which next of record \w+ in sample.json names",
    ),
    "two key frames of a camera for a sample": (
        lambda b: b.set("sample_data", 1, "is_key_frame", True) and "",
        r"sample_data.json: sample \w+ has 2 instead of one key-frame record of CAM_BACK",
    ),
    "chain that ends early": (
        lambda b: b.set("sample", 1, "next", ""),
        r"sample.json: 4 records name the scene \w+, but its chain from first_sample_token holds 2",
    ),
    "chain that begins late": (
        lambda b: b.begin_late() and "",
        r"sample.json: prev of record \w+ is '\w+', but its chain says ''",
    ),
    "chain that begins late, although prev agrees": (
        lambda b: b.forget_first(),
        r"sample.json: 4 records name the scene {0}, but its chain from first_sample_token holds 3",
    ),
    "other number of samples": (
        lambda b: b.edit_scene(nbr_samples=5),
        r"scene.json: nbr_samples of record {0} is 5, but its chain says 4",
    ),
    "other last sample": (
        lambda b: b.edit_scene(last_sample_token="gone"),
        r"scene.json: last_sample_token of record {0} is 'gone', but its chain says",
    ),
    "no description": (
        lambda b: b.edit_scene(description=None),
        r"scene.json: description of record {0} is None, expected a text",
    ),
    "time as a float": (
        lambda b: b.set("sample_data", 4, "timestamp", 1.5e15),
        r"sample_data.json: timestamp of record {0} is 1500000000000000.0, expected integer microseconds",
    ),
    "time of thousands of digits": (
        lambda b: b.set("sample_data", 4, "timestamp", 10**400),
        r"sample_data.json: timestamp of record {0} is 1000",
    ),
    "rotation that is almost zero": (
        lambda b: b.set("ego_pose", 2, "rotation", [1e-200, 0.0, 0.0, 0.0]),
        r"ego_pose.json: rotation of record {0} is not a quaternion of length 1",
    ),
    "position beyond the Earth": (
        lambda b: b.set("ego_pose", 2, "translation", [1e300, 0.0, 0.0]),
        r"ego_pose.json: translation of record {0} is not finite or farther than 21,000 km",
    ),
    "box of a kilometre": (
        lambda b: b.set("sample_annotation", 5, "size", [1000.0, 4.0, 1.5]),
        r"sample_annotation.json: size of record {0} is more than 200 m",
    ),
    "picture outside the root": (
        lambda b: b.set("sample_data", 2, "filename", "../../etc/passwd") and "",
        r"sample_data.json: filename: '../../etc/passwd' is not a path below the data root",
    ),
    "camera silent between two key frames": (
        lambda b: b.silence(0.0, 0.5),
        r"sample_data.json: {0} has no record near \d+: the nearest is 0.2\d s away, at most 0.2 s",
    ),
    "box without a position": (
        lambda b: b.set("sample_annotation", 5, "translation", [1.0, NAN, 1.5]),
        r"sample_annotation.json: translation of record {0} is not 3 finite numbers",
    ),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=list(CASES))
def test_a_broken_record_is_named_and_costs_only_its_scene(
    root_copy: Path, scenes: list[Scene], make_config: Any, tmp_path: Path, change: Any, message: str
) -> None:
    whole, bad = (scene.name for scene in scenes)
    broken = Broken(root_copy, bad)
    message = message.format(change(broken))
    broken.write()
    config = make_config(root_copy)
    with pytest.raises(MagicDriveError, match=message):
        build_infos(config, tmp_path / "infos")
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": True})})
    build_infos(skipping, tmp_path / "infos")
    assert [scene.name for scene in read_scenes(tmp_path / "infos")] == [whole]
    quarantined = json.loads((tmp_path / "infos/infos.json").read_text())["quarantined"]
    assert list(quarantined) == [bad]
    assert re.search(message, quarantined[bad])


def edit_table(root: Path, table: str, change: Any) -> None:
    path = root / f"v1.0-demo/{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def test_scenes_of_one_name_are_refused_or_quarantined_never_dropped(
    root_copy: Path, make_config: Any, tmp_path: Path
) -> None:
    edit_table(root_copy, "scene", lambda records: records[1].update(name=records[0]["name"]))
    name = json.loads((root_copy / "v1.0-demo/scene.json").read_text())[0]["name"]
    message = rf"scene.json: 2 scenes have the name '{name}'"
    config = make_config(root_copy)
    with pytest.raises(MagicDriveError, match=message):
        build_infos(config, tmp_path / "infos")
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": True})})
    with pytest.raises(MagicDriveError, match=r"no scene of v1\.0-demo is usable"):
        build_infos(skipping, tmp_path / "infos")


def test_scenes_of_one_token_and_samples_of_no_scene_are_refused(
    root_copy: Path, make_config: Any, tmp_path: Path
) -> None:
    tokens = [record["token"] for record in json.loads((root_copy / "v1.0-demo/scene.json").read_text())]
    edit_table(root_copy, "scene", lambda records: records[1].update(token=tokens[0]))
    with pytest.raises(MagicDriveError, match=rf"scene.json has no record '{tokens[1]}', which scene_token of record"):
        build_infos(make_config(root_copy), tmp_path / "infos")


def test_tables_and_sensors_that_nothing_uses_stop_nothing(
    root_copy: Path, scenes: list[Scene], make_config: Any, tmp_path: Path
) -> None:
    folder = root_copy / "v1.0-demo"
    (folder / "lidarseg.json").write_text(json.dumps([{"token": "a", "filename": "lidarseg/gone.bin"}]))
    (folder / "panoptic.json").write_text("{")
    (folder / "attribute.json").write_text("")
    edit_table(root_copy, "map", lambda records: [record.update(filename="maps/gone.png") for record in records])
    radar = {"token": "radar", "sensor_token": "radar", "translation": None, "rotation": None}
    edit_table(root_copy, "sensor", lambda records: records.append({"token": "radar", "channel": "RADAR_FRONT"}))
    edit_table(root_copy, "calibrated_sensor", lambda records: records.append(radar))
    edit_table(
        root_copy,
        "sample_data",
        lambda records: records.append({"token": "echo", "calibrated_sensor_token": "radar", "timestamp": "noon"}),
    )
    build_infos(make_config(root_copy), tmp_path / "infos")
    assert [scene.tokens for scene in read_scenes(tmp_path / "infos")] == [scene.tokens for scene in scenes]


def test_records_in_any_order_give_the_same_scenes(
    root_copy: Path, scenes: list[Scene], make_config: Any, tmp_path: Path
) -> None:
    for table in ("scene", "sample", "sample_data", "ego_pose"):
        edit_table(root_copy, table, random.Random(1).shuffle)
    build_infos(make_config(root_copy), tmp_path / "infos")
    for found, wanted in zip(read_scenes(tmp_path / "infos"), scenes, strict=True):
        assert (found.name, found.tokens, found.pictures) == (wanted.name, wanted.tokens, wanted.pictures)
        np.testing.assert_array_equal(found.camera_to_lidar, wanted.camera_to_lidar)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_table_is_read_the_same_in_blocks_of_any_length(
    synthetic_root: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(nuscenes_files, "_BLOCK", block)
    path = synthetic_root / "v1.0-demo/scene.json"
    assert [record for record, _ in nuscenes_files.stream_records(path)] == json.loads(path.read_text())


@pytest.mark.parametrize(
    "text", ["", "[", "[{]", "[{}", "[1]", "{}", "[{},]", "[{} {}]", "[{}]x", "[{'a'}]", "[" * 9999]
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scene.json"
    path.write_text(text.replace("{}", '{"token": "a"}'))
    with pytest.raises(
        MagicDriveError, match=r"scene.json is not (valid JSON: .* line \d+ column \d+|a list of records)"
    ):
        list(nuscenes_files.stream_records(path))


def spoil(path: Path) -> str:
    """Put a bracket on a new line in the middle of a JSON file; return the expected message."""
    whole = path.read_text()
    index = whole.index('"token"', len(whole) // 2)
    path.write_text(f"{whole[:index]}\n  ]{whole[index:]}")
    line = whole.count("\n", 0, index) + 2
    return rf"{path.name} is not valid JSON: .* line {line} column 3 "


def test_a_table_that_is_not_json_ends_the_stage_with_file_line_and_column(
    root_copy: Path, make_config: Any, tmp_path: Path
) -> None:
    """A broken table affects every scene, so skipping would leave none."""
    message = spoil(root_copy / "v1.0-demo/sample_data.json")
    config = make_config(root_copy)
    for skip_bad in (False, True):
        data = config.data.model_copy(update={"skip_bad": skip_bad})
        with pytest.raises(MagicDriveError, match=message):
            build_infos(config.model_copy(update={"data": data}), tmp_path / "infos")
        assert not (tmp_path / "infos").exists()
    (root_copy / "v1.0-demo/sample_data.json").write_text('{"token": []}')
    with pytest.raises(MagicDriveError, match=r"sample_data.json is not a list of records"):
        build_infos(config, tmp_path / "infos")


def test_a_broken_map_costs_only_the_scenes_on_it(
    root_copy: Path, scenes: list[Scene], make_config: Any, tmp_path: Path
) -> None:
    whole, bad = scenes
    assert whole.location != bad.location
    message = spoil(root_copy / f"maps/expansion/{bad.location}.json")
    config = make_config(root_copy)
    with pytest.raises(MagicDriveError, match=message):
        build_infos(config, tmp_path / "infos")
    build_infos(
        config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": True})}), tmp_path / "infos"
    )
    assert [scene.name for scene in read_scenes(tmp_path / "infos")] == [whole.name]
    quarantined = json.loads((tmp_path / "infos/infos.json").read_text())["quarantined"]
    assert list(quarantined) == [bad.name]
    assert re.search(message, quarantined[bad.name])


def test_a_broken_record_without_a_scene_ends_the_stage(root_copy: Path, scenes: list[Scene]) -> None:
    broken = Broken(root_copy, scenes[1].name)
    annotations = broken.tables["sample_annotation"]
    annotations.append(annotations[0] | {"token": "lost", "sample_token": "gone", "prev": "", "next": ""})
    broken.changed.add("sample_annotation")
    broken.write()
    with pytest.raises(MagicDriveError, match=r"sample.json has no record 'gone', which sample_token of record lost"):
        load_tables(root_copy, "v1.0-demo")


def test_unusable_intrinsics_are_named(root_copy: Path, make_config: Any, tmp_path: Path) -> None:
    path = root_copy / "v1.0-demo/calibrated_sensor.json"
    records = json.loads(path.read_text())
    spoilt = next(record for record in records if record["camera_intrinsic"])
    spoilt["camera_intrinsic"][1][1] = NAN
    path.write_text(json.dumps(records))
    with pytest.raises(MagicDriveError, match=f"calibrated_sensor.json: camera_intrinsic of record {spoilt['token']}"):
        build_infos(make_config(root_copy), tmp_path / "infos")
