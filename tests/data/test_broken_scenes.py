"""Broken records are named with file, record and field; ``data.skip_bad`` leaves out only their scenes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

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
