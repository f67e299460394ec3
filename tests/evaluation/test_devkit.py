"""Exported roots are nuScenes to the devkit, and its own evaluation scores what a detector found on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from nuscenes import NuScenes
from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.nuscenes_files import SPLIT, Tables
from magicdrive_core.data.nuscenes_scenes import build_scene
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.evaluation.bev_masks import Masks, evaluate_masks, map_masks
from magicdrive_core.evaluation.detection import evaluate_detections
from magicdrive_core.evaluation.key_frames import cut_to_clips, export_frames, key_samples
from magicdrive_core.evaluation.protocol import KEY_FRAMES
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.video.decoder import decode_video
from tests.evaluation.stand_in import config, write_item

VERSION = "v1.0-demo"


@pytest.fixture(scope="module")
def settings(synthetic_root: Path) -> Config:
    return config(f"data.root={synthetic_root}", "generate.generations=1")


@pytest.fixture(scope="module")
def scene(synthetic_root: Path) -> Scene:
    tables = load_tables(synthetic_root, VERSION)
    return build_scene(tables, tables.scene[0], "val", published=False)


@pytest.fixture(scope="module")
def tables(settings: Config, scene: Scene) -> Tables:
    return cut_to_clips(settings, [scene])


@pytest.fixture(scope="module")
def exported(settings: Config, scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_item(folder / "videos", scene.first_sample, scene=scene.token)
    count = export_frames(settings, folder / "videos", [scene], 0, folder / "gen0")
    assert count == 3 * len(VIEWS)
    return folder


def result(path: Path, tables: Tables, change: Callable[[list[dict]], list[dict]] = lambda boxes: boxes) -> Path:
    """A detector that found every object where it is, changed by ``change``."""
    categories = {record["token"]: record["name"] for record in tables["category"]}
    kinds = {record["token"]: categories[record["category_token"]] for record in tables["instance"]}
    names = {"vehicle.car": "car", "human.pedestrian.adult": "pedestrian", "vehicle.truck": "truck"}
    found: dict[str, list[dict]] = {record["token"]: [] for record in tables["sample"]}
    for note in tables["sample_annotation"]:
        kind = names.get(kinds[note["instance_token"]])
        if kind and note["num_lidar_pts"]:  # the devkit leaves objects without points out of the truth alone
            place = {key: note[key] for key in ("translation", "size", "rotation")}
            rest = {"velocity": [0.0, 0.0], "detection_name": kind, "detection_score": 0.9, "attribute_name": ""}
            found[note["sample_token"]].append({"sample_token": note["sample_token"], **place, **rest})
    meta = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
    path.write_text(json.dumps({"meta": meta, "results": {token: change(boxes) for token, boxes in found.items()}}))
    return path


def test_the_devkit_reads_an_exported_root(exported: Path, scene: Scene, synthetic_root: Path) -> None:
    devkit = NuScenes(VERSION, str(exported / "gen0"), verbose=False)
    (record,) = devkit.scene
    samples = key_samples(scene)
    assert (record["first_sample_token"], record["last_sample_token"], record["nbr_samples"]) == (
        samples[0],
        samples[-1],
        3,
    )
    assert json.loads((exported / "gen0" / VERSION / "splits.json").read_text()) == {SPLIT: [scene.name]}
    token, walked = samples[0], []
    while token:
        sample = devkit.get("sample", token)
        walked.append(token)
        for channel, data in sample["data"].items():
            path, _, _ = devkit.get_sample_data(data)
            if channel in VIEWS:
                assert Path(path).is_file()
                original = Path(synthetic_root, Path(path).relative_to(exported / "gen0"))
                assert original.is_file()  # nuScenes' own file name
        assert devkit.get("sample_data", sample["data"]["LIDAR_TOP"])["is_key_frame"]
        token = sample["next"]
    assert walked == samples
    for note in devkit.sample_annotation:
        devkit.box_velocity(note["token"])
        for end in ("prev", "next"):
            assert not note[end] or devkit.get("sample_annotation", note[end])


def test_pictures_are_the_videos_frames_without_loss(exported: Path, scene: Scene) -> None:
    devkit = NuScenes(VERSION, str(exported / "gen0"), verbose=False)
    video = next((exported / "videos").rglob("*_CAM_BACK.mp4"))
    frames = list(decode_video(video))
    for token, number in zip(key_samples(scene), KEY_FRAMES, strict=True):
        path = Path(devkit.get_sample_data_path(devkit.get("sample", token)["data"]["CAM_BACK"]))
        assert path.suffix == ".jpg"
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), frames[number])
        np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], frames[number])


def test_finding_everything_found_is_a_hundred_percent_of_its_classes(
    tables: Tables, scene: Scene, synthetic_root: Path, tmp_path: Path
) -> None:
    right = evaluate_detections(result(tmp_path / "right.json", tables), tables, synthetic_root, VERSION)
    seen = {name for name, value in right.class_ap.items() if value > 0}
    assert "car" in seen
    assert right.class_ap["car"] > 99
    assert right.mean_ap == pytest.approx(sum(right.class_ap.values()) / 10)
    assert set(right.scene_ap) == {scene.token}

    def away(boxes: list[dict]) -> list[dict]:
        return [box | {"translation": [box["translation"][0] + 1.5, *box["translation"][1:]]} for box in boxes]

    shifted = evaluate_detections(result(tmp_path / "shifted.json", tables, away), tables, synthetic_root, VERSION)
    assert shifted.class_ap["car"] == pytest.approx(50, abs=3)  # within 2 and 4 m, not within 0.5 and 1


def test_results_that_cannot_be_scored_say_why(tables: Tables, synthetic_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    for content, why in (
        ([], "is not a nuScenes detection result"),
        ({"meta": {}, "results": {}}, "3 of 3 samples are missing"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(MagicDriveError, match=why):
            evaluate_detections(path, tables, synthetic_root, VERSION)
    with pytest.raises(MagicDriveError, match="has no box"):
        evaluate_detections(result(path, tables, lambda boxes: []), tables, synthetic_root, VERSION)
    unknown = result(path, tables, lambda boxes: [box | {"detection_name": "ufo"} for box in boxes])
    with pytest.raises(MagicDriveError, match="nuScenes' evaluation rejects"):
        evaluate_detections(unknown, tables, synthetic_root, VERSION)
    with pytest.raises(MagicDriveError, match=r"none\.json is missing"):
        evaluate_detections(tmp_path / "none.json", tables, synthetic_root, VERSION)


def test_what_cannot_be_exported_leaves_nothing(settings: Config, scene: Scene, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "videos", tmp_path / "videos")
    next((tmp_path / "videos").rglob("*_CAM_BACK.mp4")).write_bytes(b"no video")
    with pytest.raises(MagicDriveError, match="cannot be read as a video"):
        export_frames(settings, tmp_path / "videos", [scene], 0, tmp_path / "gen0")
    assert not (tmp_path / "gen0").exists()
    with pytest.raises(UsageError, match="has no nuScenes tables"):
        cut_to_clips(config("data.format=argoverse2"), [scene])


def write_masks(path: Path, masks: Masks) -> Path:
    tokens = list(masks.by_sample)
    np.savez(path, tokens=tokens, classes=masks.classes, masks=np.stack([masks.by_sample[token] for token in tokens]))
    return path


def test_masks_against_the_projects_own_maps(settings: Config, scene: Scene, tmp_path: Path) -> None:
    samples = {scene.token: key_samples(scene)}
    blank = Masks(["drivable_area", "walkway"], {t: np.zeros((2, 150, 150), bool) for t in samples[scene.token]})
    truth = map_masks(settings, [scene], blank)
    read = Masks.read(write_masks(tmp_path / "masks.npz", truth))
    assert evaluate_masks(read, truth, samples).mean_iou == 100
    assert evaluate_masks(blank, truth, samples).mean_iou == 0
    half = Masks(truth.classes, {t: mask & (np.arange(150) < 75) for t, mask in truth.by_sample.items()})
    found = evaluate_masks(half, truth, samples)
    for c, name in enumerate(truth.classes):
        kept = sum(half.by_sample[t][c].sum() for t in samples[scene.token])
        assert found.class_iou[name] == pytest.approx(
            100 * kept / sum(truth.by_sample[t][c].sum() for t in samples[scene.token])
        )
    assert found.scene_iou == {scene.token: pytest.approx(found.mean_iou)}


def test_masks_that_cannot_be_scored_say_why(settings: Config, scene: Scene, tmp_path: Path) -> None:
    samples = {"s": ["a"]}
    ones = Masks(["car"], {"a": np.ones((1, 4, 4), bool)})
    with pytest.raises(MagicDriveError, match="is not a layer of the map"):
        map_masks(settings, [scene], ones)
    with pytest.raises(MagicDriveError, match="have no sample a"):
        evaluate_masks(Masks(["car"], {}), ones, samples)
    with pytest.raises(MagicDriveError, match=r"predicted masks have shape \(1, 2, 2\)"):
        evaluate_masks(Masks(["car"], {"a": np.ones((1, 2, 2), bool)}), ones, samples)
    with pytest.raises(MagicDriveError, match="differ from true classes"):
        evaluate_masks(Masks(["bus"], ones.by_sample), ones, samples)
    np.savez(tmp_path / "soft.npz", tokens=["a"], classes=["car"], masks=np.full((1, 1, 4, 4), 0.5))
    with pytest.raises(MagicDriveError, match="masks must be 0 or 1"):
        Masks.read(tmp_path / "soft.npz")
    with pytest.raises(MagicDriveError, match=r"none\.npz is missing"):
        Masks.read(tmp_path / "none.npz")
