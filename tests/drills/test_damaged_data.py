"""Damaged data: any change of any field, map or file name gives the same result or one line; never a traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magicdrive_core.config.load import load_config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.edits import load_edits
from magicdrive_core.data.limits import check_scene
from magicdrive_core.data.map_cache import map_path, read_map, write_map
from magicdrive_core.data.scene_store import scene_path
from magicdrive_core.data.vector_maps import load_map
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.model.published.checkpoint import read_weights
from magicdrive_core.tracking.runs import Store
from magicdrive_core.utils.files import file_name
from magicdrive_core.video.item_record import RECORD, ItemRecord, ViewFile, item_name, video_name
from tests.drills.conftest import SCALE, Drill

QUICK, LONG = 20, int(2000 * SCALE)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -1, 10**30, 0]),
    st.floats(),
    st.sampled_from(["", "gone", "../../etc/passwd", "/etc/passwd", "a\0b", "a/b", "\ud800", "x" * 5000]),
    st.lists(st.floats(), max_size=5),
    st.lists(st.lists(st.floats(), max_size=4), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
TABLES = (
    *("scene", "sample", "sample_data", "ego_pose", "sample_annotation"),
    *("instance", "category", "log", "sensor", "calibrated_sensor"),
)


def is_one_line(error: MagicDriveError) -> bool:
    assert "\n" not in error.message
    return True


def read_all(root: Path, make_config: Any) -> int:
    """Read all scenes and maps; return how many were refused in one line."""
    refused = 0
    adapter = open_adapter(make_config(root))
    for name in adapter.names():
        try:
            scene = adapter.read(name, "train")
            check_scene(scene)
            adapter.vector_map(scene)
            adapter.pictures(scene)
        except MagicDriveError as error:
            refused += is_one_line(error)
    return refused


def damage(root: Path, make_config: Any, data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(TABLES))
    path = root / f"v1.0-demo/{table}.json"
    whole = path.read_bytes()
    records = json.loads(whole)
    record = records[data.draw(st.integers(0, len(records) - 1))]
    field = data.draw(st.sampled_from(sorted(record)))
    if data.draw(st.booleans()):
        record[field] = data.draw(VALUES)
    else:
        del record[field]
    try:
        path.write_text(json.dumps(records))
        try:
            read_all(root, make_config)
        except MagicDriveError as error:
            is_one_line(error)
    finally:
        path.write_bytes(whole)


def damage_map(root: Path, location: str, data: st.DataObject) -> None:
    path = root / f"maps/expansion/{location}.json"
    whole = path.read_bytes()
    values = json.loads(whole)
    layer = data.draw(st.sampled_from(sorted(name for name, found in values.items() if found)))
    target: Any = values
    key: Any = layer
    while isinstance(target[key], list | dict) and target[key] and data.draw(st.integers(0, 3)):
        target = target[key]
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(min(len(target), 9))))
    target[key] = data.draw(VALUES)
    try:
        path.write_text(json.dumps(values))
        load_map.cache_clear()
        try:
            load_map(root, location)
        except MagicDriveError as error:
            is_one_line(error)
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def own_root(synthetic_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tables and maps of the generated data."""
    root = tmp_path_factory.mktemp("damaged")
    for name in ("v1.0-demo", "maps"):
        shutil.copytree(synthetic_root / name, root / name)
    return root


def test_sound_tables_are_read(own_root: Path, make_config: Any) -> None:
    assert read_all(own_root, make_config) == 0


@given(data=st.data())
@settings(max_examples=QUICK)
def test_any_changed_field_is_read_or_refused_in_one_line(own_root: Path, make_config: Any, data: Any) -> None:
    damage(own_root, make_config, data)


@pytest.mark.drill
@given(data=st.data())
@settings(max_examples=LONG, suppress_health_check=list(HealthCheck))
def test_thousands_of_changed_fields(own_root: Path, make_config: Any, drill: Drill, data: Any) -> None:
    """Tables: any field changed to any value or removed."""
    damage(own_root, make_config, data)
    drill.faults += 1
    drill.compared += 1


@given(data=st.data())
@settings(max_examples=QUICK)
def test_any_changed_map_is_read_or_refused_in_one_line(own_root: Path, data: Any) -> None:
    damage_map(own_root, sorted(path.stem for path in (own_root / "maps/expansion").glob("*.json"))[0], data)


@pytest.mark.drill
@given(data=st.data())
@settings(max_examples=LONG, suppress_health_check=list(HealthCheck))
def test_thousands_of_changed_maps(own_root: Path, drill: Drill, data: Any) -> None:
    """Maps: any record or field changed to any value."""
    damage_map(own_root, sorted(path.stem for path in (own_root / "maps/expansion").glob("*.json"))[0], data)
    drill.faults += 1
    drill.compared += 1


FOREIGN = st.one_of(
    st.text(min_size=1),
    st.sampled_from(["..", ".", "/", "/etc/passwd", "../../a", "a/../b", "a\0b", "._a", "a" * 400, "~"]),
)


@given(text=FOREIGN)
def test_files_named_by_data_stay_in_their_folder(text: str) -> None:
    root = Path("/root-of-results")
    paths = [
        root / file_name(text),
        scene_path(root, text),
        map_path(root, text, 200),
        root / item_name(text, 0) / video_name(text, "CAM_FRONT"),
    ]
    for path in paths:
        assert ".." not in path.parts
        assert path.is_relative_to(root)
        assert "\0" not in str(path)
        assert max(len(part.encode()) for part in path.parts) <= 200
        assert not path.name.startswith((".", "-"))
    assert file_name(file_name(text)) == file_name(text) or "~" in file_name(text)


@given(first=FOREIGN, second=FOREIGN)
def test_different_names_are_different_files(first: str, second: str) -> None:
    assert (file_name(first) == file_name(second)) == (first == second)


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_zip_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Among others: compression by LZMA, an unknown version, encryption, a name that is no UTF-8."""
    folder = tmp_path_factory.mktemp("zip")
    path = map_path(folder, "scene", 8)
    write_map(path, np.arange(128, dtype=np.uint8).reshape(2, 8, 8))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    with contextlib.suppress(MagicDriveError):
        read_map(folder, "scene", 8)


@given(data=st.data())
@settings(max_examples=60)
def test_a_changed_item_record_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("item")
    views = {view: ViewFile(f"a_{view}.mp4", "0" * 64, 7, 1.5, 40.0) for view in VIEWS}
    texts, numbers = ("f", "a", "s", "scene", "cap"), (0, 17, 17, 12, 0)
    fingerprint, sample, scene, name, caption = texts
    record = ItemRecord(
        fingerprint,
        sample,
        scene,
        name,
        *numbers,
        caption,
        1,
        "80x144",
        {"data": "x"},
        {"all": 1.0},
        views,
    )
    record.write(folder)
    assert ItemRecord.read(folder) == record
    values = json.loads((folder / RECORD).read_text())
    target: Any = values
    key = data.draw(st.sampled_from(sorted(values)))
    while isinstance(target[key], dict) and data.draw(st.booleans()):
        target = target[key]
        key = data.draw(st.sampled_from(sorted(target)))
    target[key] = data.draw(VALUES)
    (folder / RECORD).write_text(json.dumps(values))
    with contextlib.suppress(MagicDriveError):
        read = ItemRecord.read(folder)
        for line in read.faults(folder):
            assert str(folder) in line


@given(value=VALUES)
def test_a_changed_index_of_weights_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    for index in (value, {"weight_map": value}, {"weight_map": {"a": value}}):
        (folder / "model.index.json").write_text(json.dumps(index))
        with pytest.raises(MagicDriveError):
            read_weights(folder)


NO_YAML = ["a: 2024-99-99", "a: " + "[" * 1200, "a: " + "1" * 5000, "\0", "? [a]\n: 1", "a: !!python/x y"]


@pytest.mark.parametrize("text", NO_YAML)
def test_settings_that_are_no_yaml_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        load_config(tmp_path / "params.yaml")
    assert is_one_line(error.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_edits_hold_finite_numbers(tmp_path: Path, value: str) -> None:
    path = tmp_path / "edits.yaml"
    path.write_text(f"objects:\n  - move: abc\n    by: [0, {value}]\n")
    with pytest.raises(UsageError, match="finite number"):
        load_edits(path)


def test_a_missing_database_driver_is_named(tmp_path: Path, make_config: Any) -> None:
    tracking = make_config(tmp_path).tracking.model_copy(update={"uri": "postgresql://host/database"})
    with pytest.raises(MagicDriveError, match=r"driver of the database of tracking\.uri is not installed: psycopg"):
        Store(tracking, tmp_path)
