"""The infos: both alignments, the parquet file, splits, and messages about unusable data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from nuscenes.nuscenes import NuScenes
from PIL import Image

from magicdrive_core.data.infos import build_infos, pictures_changed, read_scenes
from magicdrive_core.data.nuscenes_scenes import build_scene, choose_splits, read_objects
from magicdrive_core.data.nuscenes_tables import LIDAR, Tables, load_tables
from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.data.scene_store import SCHEMA
from magicdrive_core.data.timeline import interpolate
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry import cameras, poses
from tests.conftest import PROJECT


@pytest.fixture(scope="module")
def tables(synthetic_root: Path) -> Tables:
    return load_tables(synthetic_root, "v1.0-demo")


@pytest.fixture(scope="module")
def drive(shared: Path) -> Tables:
    return load_tables(shared / "data/nuscenes-drive", "v1.0-drive")


def scene_of(tables: Tables, *, published: bool) -> Scene:
    return build_scene(tables, tables.scene[0], "both", published=published)


def edit(root: Path, table: str, change: Any) -> None:
    path = root / "v1.0-demo" / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def test_frames_are_12_hz_between_key_frames(tables: Tables) -> None:
    for record in tables.scene:
        scene, samples = build_scene(tables, record, "train", published=False), tables.of_scene(record).samples()
        assert len(scene) == 6 * (len(samples) - 1) + 1
        assert scene.tokens[::6] == [sample["token"] for sample in samples]
        assert scene.tokens[3] == samples[0]["token"] + "3"
        assert scene.key_frames.tolist() == [index % 6 == 0 for index in range(len(scene))]
        np.testing.assert_array_equal(scene.timestamps[::6], [sample["timestamp"] for sample in samples])
        np.testing.assert_allclose(np.diff(scene.timestamps), 1e6 / 12, rtol=0.05)
        assert {name for frame in scene.boxes for name in frame.names} <= set(CLASSES)


def test_key_frames_hold_the_poses_boxes_and_pictures_of_the_devkit(tables: Tables, synthetic_root: Path) -> None:
    devkit = NuScenes("v1.0-demo", str(synthetic_root), verbose=False)
    record = tables.scene[1]
    scene = build_scene(tables, record, "train", published=False)
    for key, sample in enumerate(tables.of_scene(record).samples()):
        index, data = 6 * key, devkit.get("sample", sample["token"])["data"]
        for view, channel in enumerate(cameras.VIEWS):
            path, boxes, intrinsics = devkit.get_sample_data(data[channel], box_vis_level=0)
            assert str(tables.root / scene.pictures[index][view]) == path
            np.testing.assert_array_equal(scene.intrinsics[index, view], intrinsics)
            # The devkit transforms boxes to the camera through the global frame at the time of the camera.
            own = poses.transform(poses.inverse(scene.camera_to_lidar[index, view]), scene.boxes[index].boxes[:, :3])
            for box in boxes:
                token = devkit.get("sample_annotation", box.token)["instance_token"]
                if token in scene.boxes[index].ids:
                    np.testing.assert_allclose(own[scene.boxes[index].ids.index(token)], box.center, atol=1e-6)
        _, boxes, _ = devkit.get_sample_data(data[LIDAR])
        wanted = {devkit.get("sample_annotation", box.token)["instance_token"]: box for box in boxes}
        for token, row in zip(scene.boxes[index].ids, scene.boxes[index].boxes, strict=True):
            np.testing.assert_allclose(row[:3], wanted[token].center, atol=1e-9)
            np.testing.assert_allclose(row[3:6], wanted[token].wlh)
            nose = wanted[token].rotation_matrix[:, 0]
            turned = -row[6] - np.pi / 2 - np.arctan2(nose[1], nose[0])
            np.testing.assert_allclose([np.cos(turned), np.sin(turned)], [1, 0], atol=1e-9)


def test_projections_of_a_real_key_frame(shared: Path) -> None:
    expected = json.loads((shared / "data/nuscenes-one/expected_projections.json").read_text())
    scene = scene_of(load_tables(shared / "data/nuscenes-one", "v1.0-one"), published=False)
    assert len(scene) == 1
    assert sum(map(len, expected.values())) > 50
    for channel, objects in expected.items():
        view = cameras.VIEWS.index(channel)
        centres = poses.transform(poses.inverse(scene.camera_to_lidar[0, view]), scene.boxes[0].boxes[:, :3])
        pixels, depth = cameras.project(centres, scene.intrinsics[0, view])
        for seen in objects:
            off = np.abs(pixels - seen["center_2d"]).max(1) + np.abs(depth - seen["depth"])
            nearest = int(np.argmin(off))
            assert scene.boxes[0].names[nearest] == seen["label"]
            np.testing.assert_allclose(pixels[nearest], seen["center_2d"], atol=1e-3)
            np.testing.assert_allclose(depth[nearest], seen["depth"], atol=1e-3)


def test_pictures_are_the_nearest_in_time_although_records_are_missing(drive: Tables) -> None:
    scene, tables = scene_of(drive, published=False), drive.of_scene(drive.scene[0])
    for view, channel in enumerate(cameras.VIEWS):
        records = tables.sensor_records(channel)
        times = {entry["filename"]: entry["timestamp"] for entry in records}
        key_times = np.array([entry["timestamp"] for entry in records if entry["is_key_frame"]])
        wanted = np.interp(np.arange(len(scene)) / 6, np.arange(len(key_times)), key_times)
        chosen = np.array([times[views[view]] for views in scene.pictures])
        every = np.array(sorted(times.values()))
        np.testing.assert_allclose(np.abs(chosen - wanted), np.abs(every[:, None] - wanted).min(0))
        assert np.all(np.diff(chosen) >= 0)
        assert np.abs(chosen - wanted).max() < 90_000  # at most one dropped record away


def test_the_published_alignment_follows_records_and_its_lidar_jumps(drive: Tables) -> None:
    exact, published = (scene_of(drive, published=flag) for flag in (False, True))
    tables = drive.of_scene(drive.scene[0])
    records = tables.sensor_records(LIDAR)
    keys = [index for index, entry in enumerate(records) if entry["is_key_frame"]]
    for frame in (0, 7, 20, 186):
        entry = records[keys[frame // 6] + frame % 6]
        pose = tables.find("ego_pose", entry["ego_pose_token"])
        np.testing.assert_allclose(published.ego_to_global[frame], poses.pose(pose["rotation"], pose["translation"]))
    steps, sawing = (
        np.linalg.norm(np.diff(scene.ego_to_global[60:90, :3, 3], axis=0), axis=1) for scene in (exact, published)
    )
    assert steps.max() < 1.5 * np.median(steps)
    assert sawing.max() > 3 * np.median(sawing)
    # equal objects at equal times: they agree in the global frame, whatever the lidar pose
    for frame in (3, 40):
        centres = [
            poses.transform(scene.ego_to_global[frame] @ scene.lidar_to_ego[frame], scene.boxes[frame].boxes[:, :3])
            for scene in (exact, published)
        ]
        assert exact.boxes[frame].ids == published.boxes[frame].ids
        np.testing.assert_allclose(*centres, atol=1e-6)


def test_interpolated_objects_are_near_held_back_annotations(drive: Tables) -> None:
    """Hold back every second key frame of the real drive, and compare its boxes."""
    tables = drive.of_scene(drive.scene[0])
    samples, errors = tables.samples(), []
    for before, held_back, after in zip(samples[:-2:2], samples[1:-1:2], samples[2::2], strict=True):
        share = (held_back["timestamp"] - before["timestamp"]) / (after["timestamp"] - before["timestamp"])
        (between,) = interpolate(read_objects(tables, before), read_objects(tables, after), np.array([share]))
        truth = read_objects(tables, held_back)
        rows = {token: row for row, token in enumerate(truth.ids)}
        errors += [
            np.linalg.norm(centre - truth.centres[rows[token]])
            for token, centre in zip(between.ids, between.centres, strict=True)
            if token in rows
        ]
    assert len(errors) > 500
    assert np.median(errors) < 0.05
    assert np.quantile(errors, 0.95) < 0.5


def test_objects_in_only_one_of_two_key_frames_are_left_out_between(tables: Tables) -> None:
    scene = scene_of(tables, published=False)
    for start in range(0, len(scene) - 6, 6):
        first, last = set(scene.boxes[start].ids), set(scene.boxes[start + 6].ids)
        for between in scene.boxes[start + 1 : start + 6]:
            assert set(between.ids) == first & last


def test_a_missing_key_frame_is_bridged_at_12_hz(root_copy: Path) -> None:
    """Data that was cut with care: the key frame is gone from every table that names it."""
    tables = load_tables(root_copy, "v1.0-demo")
    scene = tables.scene[0]
    first, gone, last, *_ = (sample["token"] for sample in tables.of_scene(scene).samples())

    def drop_sample(records: list[dict[str, Any]]) -> None:
        by_token = {record["token"]: record for record in records}
        by_token[first]["next"], by_token[last]["prev"] = last, first
        records.remove(by_token[gone])

    def drop_annotations(records: list[dict[str, Any]]) -> None:
        by_token = {record["token"]: record for record in records}
        for record in [record for record in records if record["sample_token"] == gone]:
            for side, other in (("prev", "next"), ("next", "prev")):
                if record[side]:
                    by_token[record[side]][other] = record[other]
            records.remove(record)
            kept[record["instance_token"]] = kept.get(record["instance_token"], 0) - 1

    def move_sweeps(records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["sample_token"] == gone:
                record.update(sample_token=first, is_key_frame=False)

    def count(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["nbr_annotations"] += kept.get(record["token"], 0)

    kept: dict[str, int] = {}
    edit(root_copy, "sample", drop_sample)
    edit(root_copy, "sample_annotation", drop_annotations)
    edit(root_copy, "instance", count)
    edit(root_copy, "sample_data", move_sweeps)
    edit(root_copy, "scene", lambda records: records[0].update(nbr_samples=records[0]["nbr_samples"] - 1))
    tables = load_tables(root_copy, "v1.0-demo")
    bridged = build_scene(tables, tables.scene[0], "train", published=False)
    np.testing.assert_allclose(np.diff(bridged.timestamps), 1e6 / 12, rtol=0.05)
    assert bridged.tokens[11] == first + "b"
    assert gone not in bridged.tokens


def test_every_field_survives_the_round_trip_through_parquet(tables: Tables, scenes: list[Scene]) -> None:
    for read in scenes:
        record = next(record for record in tables.scene if record["token"] == read.token)
        built = build_scene(tables, record, read.split, published=False)
        assert (read.name, read.location, read.description) == (built.name, built.location, built.description)
        assert read.tokens == built.tokens
        assert read.pictures == built.pictures
        for field in ("key_frames", "timestamps", "lidar_to_ego", "ego_to_global", "intrinsics", "camera_to_lidar"):
            np.testing.assert_array_equal(getattr(read, field), getattr(built, field))
        for own, frame in zip(read.boxes, built.boxes, strict=True):
            assert (own.ids, own.names) == (frame.ids, frame.names)
            np.testing.assert_array_equal(own.boxes, frame.boxes)


def test_equal_tables_give_equal_bytes(synthetic_root: Path, infos: Path, make_config: Any, tmp_path: Path) -> None:
    build_infos(make_config(synthetic_root), tmp_path / "again")
    for name in ("frames.parquet", "infos.json"):
        assert (tmp_path / "again" / name).read_bytes() == (infos / name).read_bytes()


def test_the_summary_names_alignment_and_counts(infos: Path, scenes: list[Scene]) -> None:
    summary = json.loads((infos / "infos.json").read_text())
    assert summary["rule"] == "by time stamp"
    assert summary["frames"] == sum(map(len, scenes))
    assert summary["splits"] == {"train": [scenes[0].name], "val": [scenes[1].name]}
    assert summary["pictures"] == len({path for scene in scenes for views in scene.pictures for path in views})
    assert sum(summary["boxes"].values()) == sum(len(frame.ids) for scene in scenes for frame in scene.boxes)


def test_splits_follow_the_setting_or_the_official_ones() -> None:
    names = [f"scene-{index:04d}" for index in range(1, 10)]
    assert [name for name, split in choose_splits(names, "auto", "v1.0-demo").items() if split == "val"] == names[-2:]
    assert choose_splits(names[:1], "auto", "v1.0-demo") == {names[0]: "both"}
    assert choose_splits(names, [names[3]], "v1.0-demo")[names[3]] == "val"
    official = choose_splits(["scene-0061", "scene-0103", "scene-0916"], "auto", "v1.0-mini")
    assert official == {"scene-0061": "train", "scene-0103": "val", "scene-0916": "val"}
    with pytest.raises(UsageError, match="scene-9999"):
        choose_splits(names, ["scene-9999"], "v1.0-demo")
    with pytest.raises(UsageError, match="at least one"):
        choose_splits(names, names, "v1.0-demo")


def test_a_root_without_tables_is_named(tmp_path: Path, root_copy: Path) -> None:
    with pytest.raises(MagicDriveError, match="no nuScenes tables") as error:
        load_tables(tmp_path / "nowhere", "v1.0-mini")
    assert "magicdrive synth" in error.value.hint
    with pytest.raises(MagicDriveError, match=r"v1\.0-mini is missing") as error:
        load_tables(root_copy, "v1.0-mini")
    assert "v1.0-demo" in error.value.hint


@pytest.mark.parametrize("table", ["scene", "ego_pose"])
def test_broken_and_missing_tables_are_named(root_copy: Path, table: str) -> None:
    path = root_copy / "v1.0-demo" / f"{table}.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(MagicDriveError, match=f"{table}.json is not valid JSON"):
        load_tables(root_copy, "v1.0-demo")
    path.unlink()
    with pytest.raises(MagicDriveError, match=f"{table}.json is missing"):
        load_tables(root_copy, "v1.0-demo")


def test_a_missing_record_is_named(root_copy: Path) -> None:
    edit(root_copy, "ego_pose", lambda records: records.pop(3))
    tables = load_tables(root_copy, "v1.0-demo")
    with pytest.raises(MagicDriveError, match=r"ego_pose.json has no record"):
        [build_scene(tables, scene, "train", published=False) for scene in tables.scene]


@pytest.mark.parametrize(
    ("table", "field", "value", "message"),
    [
        ("ego_pose", "translation", [float("nan"), 0.0, 0.0], "translation of record .* is not 3 finite numbers"),
        ("ego_pose", "rotation", [1.0, 0.0, 0.0], "rotation of record .* is not 4 finite numbers"),
        ("ego_pose", "rotation", [0.0, 0.0, 0.0, 0.0], "ego_pose.json: rotation of record .* is zero"),
        ("calibrated_sensor", "translation", None, "calibrated_sensor.json: translation of record .* is not 3 finite"),
        ("sample_annotation", "size", [0.0, 1.0, 1.0], "size of record .* is not positive"),
        ("sample", "timestamp", 7, "sample.json: timestamp of record .* is not later"),
        (
            "sample_data",
            "timestamp",
            "noon",
            "sample_data.json: timestamp of record .* is 'noon', expected integer microseconds",
        ),
    ],
)
def test_impossible_values_are_named(root_copy: Path, table: str, field: str, value: Any, message: str) -> None:
    edit(root_copy, table, lambda records: [record.update({field: value}) for record in records])
    tables = load_tables(root_copy, "v1.0-demo")
    with pytest.raises(MagicDriveError, match=message):
        scene_of(tables, published=False)


def test_a_missing_field_is_named(root_copy: Path) -> None:
    edit(root_copy, "ego_pose", lambda records: [record.pop("rotation") for record in records])
    tables = load_tables(root_copy, "v1.0-demo")
    with pytest.raises(MagicDriveError, match=r"ego_pose.json: record \w+ has no rotation"):
        scene_of(tables, published=False)


def test_bad_scenes_are_quarantined_on_request(
    root_copy: Path, scenes: list[Scene], make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = scenes
    picture = root_copy / broken.pictures[3][2]
    picture.unlink()
    Image.new("RGB", (800, 450)).save(picture)
    config = make_config(root_copy)
    with pytest.raises(MagicDriveError, match=f"{picture.name} has 800x450 pixels, expected 1600x900"):
        build_infos(config, tmp_path / "infos")
    skipping = config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": True})})
    build_infos(skipping, tmp_path / "infos")
    assert [scene.name for scene in read_scenes(tmp_path / "infos")] == [whole.name]
    (entry,) = json.loads((tmp_path / "infos/infos.json").read_text())["quarantined"].items()
    assert entry[0] == broken.name
    assert str(picture) in entry[1]
    assert f"{broken.name} is left out" in capsys.readouterr().err
    edit(root_copy, "sample_annotation", lambda records: [record.update(size=[1, 0, 1]) for record in records])
    with pytest.raises(MagicDriveError, match=r"no scene of v1.0-demo is usable"):
        build_infos(skipping, tmp_path / "infos")
    assert len(read_scenes(tmp_path / "infos")) == 1  # the earlier result stays


def test_parquet_metadata_names_the_alignment(
    infos: Path, synthetic_root: Path, make_config: Any, tmp_path: Path
) -> None:
    build_infos(make_config(synthetic_root, published=True), tmp_path / "infos")
    for folder, alignment in ((infos, b"by time stamp"), (tmp_path / "infos", b"published")):
        metadata = pq.read_schema(folder / "frames.parquet").metadata
        assert metadata[b"magicdrive.rule"] == alignment
        assert metadata[b"magicdrive.unpaired"] == b"leave_out"


def test_every_column_is_documented() -> None:
    page = (PROJECT / "docs/reference/file-formats.md").read_text()
    assert [name for name in SCHEMA.names if f"`{name}`" not in page] == []


def test_missing_and_empty_pictures_are_counted(root_copy: Path, make_config: Any, tmp_path: Path) -> None:
    first, second, *_ = sorted((root_copy / "samples" / "CAM_BACK").iterdir())
    first.unlink()
    second.unlink()
    second.touch()
    with pytest.raises(MagicDriveError, match=f"{first.name} is missing or empty .2 pictures") as error:
        build_infos(make_config(root_copy), tmp_path / "infos")
    assert f"magicdrive synth --render-for {root_copy} --version v1.0-demo" in error.value.hint
    assert not (tmp_path / "infos").exists()


def test_replaced_pictures_under_equal_tables_are_noticed(
    synthetic_root: Path, make_config: Any, tmp_path: Path
) -> None:
    root, infos = tmp_path / "root", tmp_path / "infos"
    shutil.copytree(synthetic_root, root, copy_function=os.link)
    assert not pictures_changed(infos, root)  # DVC runs the stage anyway
    build_infos(make_config(root), infos)
    assert not pictures_changed(infos, root)
    assert not pictures_changed(infos, synthetic_root)  # a copy with other dates
    first, second = sorted((root / "samples/CAM_BACK").iterdir())[:2]
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    assert pictures_changed(infos, root)


def test_a_single_real_key_frame_is_a_scene_of_one_frame(shared: Path, make_config: Any, tmp_path: Path) -> None:
    root = shared / "data/nuscenes-one"
    build_infos(make_config(root, "v1.0-one"), tmp_path / "infos")
    (scene,) = read_scenes(tmp_path / "infos")
    assert (len(scene), scene.split, len(scene.boxes[0].ids)) == (1, "both", 68)
    with pytest.raises(MagicDriveError, match=r"no scene of v1.0-one has more than six frames"):
        build_infos(make_config(root, "v1.0-one", published=True), tmp_path / "published")


def test_missing_pictures_are_reported_with_how_to_render_them(shared: Path, make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"1\d\d\d pictures are unusable") as error:
        build_infos(make_config(shared / "data/nuscenes-drive", "v1.0-drive"), tmp_path / "infos")
    assert "--render-for" in error.value.hint


def test_the_summary_names_the_published_alignment(synthetic_root: Path, make_config: Any, tmp_path: Path) -> None:
    build_infos(make_config(synthetic_root, published=True), tmp_path / "infos")
    assert json.loads((tmp_path / "infos" / "infos.json").read_text())["rule"] == "published"
    assert len(read_scenes(tmp_path / "infos")) == 2
