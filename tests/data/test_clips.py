"""Clips, their conditions, and the augmentation of conditions in training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Bucket
from magicdrive_core.data.clips import balance_weather, caption, list_clips, weather_groups
from magicdrive_core.data.conditions import (
    add_boxes,
    anchor_frames,
    build_conditions,
    clip_conditions,
    drop_frames,
    hide_boxes,
)
from magicdrive_core.data.map_cache import BevMaps, read_map
from magicdrive_core.data.records import Clip, ClipConditions, FrameBoxes, Scene, SceneHeader
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import bucket_clips
from magicdrive_core.geometry import poses
from tests.conftest import PROJECT


@pytest.fixture(scope="module")
def conditions(synthetic_root: Path, infos: Path, make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditions") / "conditions"
    build_conditions(make_config(synthetic_root), infos, folder)
    return folder


@pytest.fixture(scope="module")
def clip_input(conditions: Path, scenes: list[Scene]) -> ClipConditions:
    bits = read_map(conditions, scenes[0].token, 200)
    return clip_conditions(scenes[0], Clip(scenes[0].token, 2, 9), "80x144", bits[2:11], published=False)


def test_training_clips_start_at_every_stride(scenes: list[Scene]) -> None:
    (train,) = (scene for scene in scenes if scene.split == "train")
    assert len(train) == 19
    assert [clip.start for clip in list_clips(scenes, "train", 9, 4)] == [0, 4, 8]
    assert [clip.start for clip in list_clips(scenes, "train", 17, 1)] == [0, 1, 2]
    assert [clip.start for clip in list_clips(scenes, "train", 1, 4)] == [0, 6, 12, 18]
    assert list_clips(scenes, "train", 25, 1) == []
    assert {clip.scene for clip in list_clips(scenes, "train", 9, 4)} == {train.token}


@pytest.mark.parametrize(
    ("length", "frames"), [(19, 17), (25, 25), (26, 25), (32, 25), (220, 217), (241, 241), (250, 241)]
)
def test_whole_scenes_are_cut_to_8n_plus_1(scenes: list[Scene], length: int, frames: int) -> None:
    outline = replace(SceneHeader.of(scenes[0]), split="both", key_frames=np.arange(length) % 6 == 0)
    for split in ("train", "val"):
        assert list_clips([outline], split, 241, 1, whole=True) == [Clip(outline.token, 0, frames)]


def test_a_bucket_of_whole_scenes_repeats_them_and_has_no_batch() -> None:
    with pytest.raises(ValueError, match="whole needs batch 1"):
        Bucket(resolution="224x400", frames=241, batch=2, whole=True)
    config = load_config(PROJECT / "profiles/nuscenes.yaml")
    (whole,) = (bucket for bucket in config.training.stage3.buckets if bucket.whole)
    outlines = [SceneHeader(str(n), str(n), "train", "", "", np.ones(187 + 9 * n, bool)) for n in range(6)]
    clips = bucket_clips(config, "stage3", whole, outlines)
    assert len(clips) == 6 * 40
    assert [clip.frames for clip in clips[:6]] == [185, 193, 201, 209, 217, 225]


def test_validation_takes_the_first_clip_of_each_scene(scenes: list[Scene]) -> None:
    (val,) = (scene for scene in scenes if scene.split == "val")
    for frames in (1, 9, 17):
        assert list_clips(scenes, "val", frames, 1) == [Clip(val.token, 0, frames)]
    assert list_clips(scenes, "val", 25, 1) == []
    both = [replace(scenes[0], split="both")]
    assert list_clips(both, "val", 9, 4)
    assert list_clips(both, "train", 9, 4)


@pytest.mark.parametrize(
    ("description", "words", "substrings"),
    [
        ("Night, rain, peds", ["night", "rain"], ["night", "rain"]),
        ("Rainy, parked cars", ["rain"], ["rain"]),
        ("Train station, terrain", ["none"], ["rain"]),
        ("Turn right, fortnight market", ["none"], ["night"]),
        ("After rain", ["rain"], ["rain"]),
    ],
)
def test_weather_groups_are_found_by_words(description: str, words: list[str], substrings: list[str]) -> None:
    assert weather_groups(description) == words
    assert weather_groups(description, published=True) == substrings


def test_balanced_weather_groups_have_similar_sizes(scenes: list[Scene]) -> None:
    descriptions = ["Day"] * 7 + ["Night"] * 2 + ["Rain", "Rain, night", "Rain"]
    many = [replace(scenes[0], token=str(n), description=text) for n, text in enumerate(descriptions)]
    tokens = [scene.token for scene in balance_weather(many)]
    assert tokens == [*["7", "8", "10"] * 2, *["9", "10", "11"] * 2, *map(str, range(7))]
    assert balance_weather([]) == []
    assert "onenorth. Daytime. Day." in caption(replace(many[0], location="singapore-onenorth"), say_daytime=True)


def test_conditions_hold_maps_for_the_sizes_in_use_and_counts(conditions: Path, scenes: list[Scene]) -> None:
    assert [path.name for path in (conditions / "bev").iterdir()] == ["200"]
    for scene in scenes:
        assert read_map(conditions, scene.token, 200).shape == (len(scene), 200, 200)
    counts = json.loads((conditions / "clips.json").read_text())
    assert counts["train"]["80x144"] == {"1": 4, "9": 3, "17": 1}
    assert counts["val"]["96x176"] == {"1": 1}


def test_equal_infos_give_equal_conditions(
    synthetic_root: Path, infos: Path, conditions: Path, make_config: Any, tmp_path: Path
) -> None:
    build_conditions(make_config(synthetic_root), infos, tmp_path / "again")
    for path in (path for path in conditions.rglob("*") if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(conditions)).read_bytes() == path.read_bytes()


def test_maps_drawn_on_demand_equal_cached_maps(
    synthetic_root: Path, infos: Path, conditions: Path, scenes: list[Scene], make_config: Any, tmp_path: Path
) -> None:
    config = make_config(synthetic_root)
    live = config.model_copy(update={"conditions": config.conditions.model_copy(update={"maps": "live"})})
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/conditions").symlink_to(conditions)
    cached, drawn = BevMaps(config, tmp_path), BevMaps(live, tmp_path / "nowhere")
    clip = Clip(scenes[1].token, 3, 9)
    np.testing.assert_array_equal(cached.of_clip(scenes[1], clip, "80x144"), drawn.of_clip(scenes[1], clip, "80x144"))
    assert cached.of_scene(scenes[0], "80x144").shape == (19, 200, 200)
    build_conditions(live, infos, tmp_path / "live")
    assert [path.name for path in (tmp_path / "live").iterdir()] == ["clips.json"]


def test_a_map_of_another_version_leaves_no_output(
    root_copy: Path, infos: Path, make_config: Any, tmp_path: Path
) -> None:
    for path in (root_copy / "maps" / "expansion").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "1.0"}))
    with pytest.raises(MagicDriveError, match=r"map version 1.0"):
        build_conditions(make_config(root_copy), infos, tmp_path / "conditions")
    assert not (tmp_path / "conditions").exists()


def test_conditions_of_a_clip_have_their_shapes_and_values(clip_input: ClipConditions, scenes: list[Scene]) -> None:
    scene = scenes[0]
    N = len(clip_input.box_ids)
    assert clip_input.box_ids == sorted({token for frame in scene.boxes[2:11] for token in frame.ids})
    assert clip_input.cameras.shape == (9, 6, 3, 7)
    assert clip_input.box_corners.shape == (9, N, 8, 3)
    assert clip_input.box_masks.shape == (9, 6, N)
    assert clip_input.bev_map.shape == (9, 200, 200)
    assert clip_input.bev_map.dtype == np.uint8
    assert clip_input.bev_map.any()
    assert (clip_input.height, clip_input.width, clip_input.fps) == (80, 144, 12)
    assert clip_input.caption == caption(scene) == f"A driving scene image at {scene.location}. {scene.description}."
    np.testing.assert_allclose(clip_input.ego_motion[0], np.eye(4), atol=1e-12)
    origin = poses.transform(scene.ego_to_global[2] @ scene.lidar_to_ego[2], np.zeros(3))
    moved = poses.transform(poses.inverse(scene.ego_to_global[9] @ scene.lidar_to_ego[9]), origin)
    np.testing.assert_allclose(clip_input.ego_motion[7, :3, 3], moved, atol=1e-6)


def test_absent_objects_have_no_class_no_corners_and_no_mask(scenes: list[Scene]) -> None:
    boxes = list(scenes[0].boxes)
    boxes[5] = FrameBoxes(boxes[5].ids[1::2], boxes[5].names[1::2], boxes[5].boxes[1::2])
    scene = replace(scenes[0], boxes=boxes)
    clip_input = clip_conditions(
        scene, Clip(scene.token, 2, 9), "80x144", np.zeros((9, 8, 8), np.uint8), published=False
    )
    absent = clip_input.box_classes < 0
    for index, frame in enumerate(boxes[2:11]):
        assert {clip_input.box_ids[slot] for slot in np.flatnonzero(~absent[index])} == set(frame.ids)
    assert absent.any()
    assert not clip_input.box_corners[absent].any()
    assert not clip_input.box_masks.transpose(0, 2, 1)[absent].any()
    assert np.all(clip_input.box_masks.sum(1)[~absent] >= 1)  # the ring of cameras has no gaps


def test_single_frames_have_the_published_frame_rate(scenes: list[Scene]) -> None:
    still = clip_conditions(scenes[0], Clip("", 6, 1), "224x400", np.zeros((1, 8, 8), np.uint8), published=False)
    assert still.fps == 120


def test_a_clip_without_objects_has_no_slots(scenes: list[Scene]) -> None:
    empty = replace(scenes[0], boxes=[FrameBoxes([], [], np.zeros((0, 7)))] * len(scenes[0]))
    clip_input = clip_conditions(empty, Clip("", 0, 9), "224x400", np.zeros((9, 8, 8), np.uint8), published=True)
    assert clip_input.box_corners.shape == (9, 0, 8, 3)
    assert clip_input.box_masks.shape == (9, 6, 0)
    hide_boxes(add_boxes(clip_input, 1.0, np.random.default_rng(0)), np.ones(9, bool), 1.0, np.random.default_rng(0))


@pytest.mark.parametrize(("published", "shown"), [(True, [0, 6]), (False, [4])])
def test_hidden_frames_hide_all_boxes_and_key_frames_none(
    clip_input: ClipConditions, scenes: list[Scene], published: bool, shown: list[int]
) -> None:
    """The clip starts at frame 2 of the scene, whose key frames are 0, 6, 12."""
    always = anchor_frames(scenes[0], Clip(scenes[0].token, 2, 9), published=published)
    assert np.flatnonzero(always).tolist() == shown
    rng = np.random.default_rng(0)
    masks = hide_boxes(clip_input, always, 1.0, rng).box_masks
    for frame in range(9):
        if frame not in shown:
            assert (masks[frame] == -1).all()
        else:
            np.testing.assert_array_equal(masks[frame], clip_input.box_masks[frame])
    share = np.mean([(hide_boxes(clip_input, always, 0.4, rng).box_masks[1] == -1).all() for _ in range(400)])
    assert 0.3 < share < 0.5
    assert not (clip_input.box_masks == -1).any()


def test_added_boxes_are_present_out_of_view_and_at_most_three(clip_input: ClipConditions) -> None:
    rng = np.random.default_rng(0)
    masks = add_boxes(clip_input, 1.0, rng).box_masks
    added = (masks == 1) & (clip_input.box_masks == 0)
    assert np.array_equal(masks[clip_input.box_masks == 1], clip_input.box_masks[clip_input.box_masks == 1])
    unseen = ((clip_input.box_masks == 0) & (clip_input.box_classes >= 0)[:, None]).sum(-1)
    assert np.all(added.sum(-1) <= np.minimum(3, unseen))
    assert np.all(added.sum(-1) >= np.minimum(1, unseen))
    assert not added.transpose(0, 2, 1)[clip_input.box_classes < 0].any()
    np.testing.assert_array_equal(add_boxes(clip_input, 0.0, rng).box_masks, clip_input.box_masks)


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_dropped_frames_are_between_the_first_and_last_frame(frames: int, ratio: float, seed: int) -> None:
    keep = drop_frames(frames, ratio, np.random.default_rng(seed))
    assert keep.shape == (frames,)
    assert keep[0]
    assert keep[-1]
    assert (~keep).sum() == (int(ratio * (frames - 2)) if frames > 2 else 0)
