"""Conditions equal those of the published pipeline for the same raw data (golden_condition.npz)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyquaternion import Quaternion

from magicdrive_core.data.bev_maps import rasterise, unpack
from magicdrive_core.data.conditions import clip_conditions
from magicdrive_core.data.pictures import read_picture
from magicdrive_core.data.records import CLASSES, MAP_LAYERS, Clip, FrameBoxes, Scene
from magicdrive_core.data.vector_maps import VectorMap
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import VIEWS, Framing
from tests.golden.sets import COMPACT, read_arrays, settings

CLIPS = [("224x400", 17, 200), ("424x800", 1, 400), ("848x1600", 9, 400)]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return read_arrays(COMPACT / "golden_condition.npz")


@pytest.fixture(scope="module")
def meta(golden: dict[str, np.ndarray]) -> dict[str, Any]:
    return settings(golden)


@pytest.fixture(scope="module")
def scene(golden: dict[str, np.ndarray], meta: dict[str, Any]) -> Scene:
    order = [meta["raw_camera_order"].index(view) for view in VIEWS]
    rotation = golden["raw/sensor2lidar_rotation"][:, order]
    boxes = []
    for index, frame in enumerate(meta["raw_boxes"]):
        rows = [row for row, name in enumerate(frame["names"]) if name in CLASSES]
        boxes.append(
            FrameBoxes(
                [frame["ids"][row] for row in rows],
                [frame["names"][row] for row in rows],
                golden[f"raw/gt_boxes/{index:02d}"][rows],
            )
        )
    return Scene(
        token="scene",
        name="scene-0001",
        split="train",
        location="singapore-onenorth",
        description="Rain, parked cars, peds",
        tokens=[f"{index:032x}" for index in range(17)],
        key_frames=np.arange(17) % 6 == 0,
        timestamps=np.arange(17) * 83_333,
        lidar_to_ego=poses.pose(golden["raw/lidar2ego_rotation"], golden["raw/lidar2ego_translation"]),
        ego_to_global=poses.pose(golden["raw/ego2global_rotation"], golden["raw/ego2global_translation"]),
        pictures=[[""] * 6] * 17,
        intrinsics=golden["raw/camera_intrinsics"][:, order],
        camera_to_lidar=poses.pose(rotation, golden["raw/sensor2lidar_translation"][:, order]),
        boxes=boxes,
    )


def published(scene: Scene, size: str, frames: int) -> Any:
    return clip_conditions(scene, Clip("scene", 0, frames), size, np.zeros((frames, 4, 4), np.uint8), published=True)


@pytest.mark.parametrize(("size", "frames", "cells"), CLIPS)
def test_cameras_ego_motion_and_text(
    golden: dict[str, np.ndarray], meta: dict[str, Any], scene: Scene, size: str, frames: int, cells: int
) -> None:
    key, own = f"clip_{size}_f{frames}/", published(scene, size, frames)
    np.testing.assert_array_equal(own.cameras.astype(np.float32), golden[f"{key}camera_param"])
    np.testing.assert_allclose(own.ego_motion, golden[f"{key}frame_emb"], atol=5e-7)
    assert own.caption == meta[key]["captions"][0]
    assert (own.fps, own.height, own.width) == (meta[key]["fps"], meta[key]["height"], meta[key]["width"])
    for matrix in golden[f"{key}img_aug_matrix"]:
        np.testing.assert_array_equal(Framing(own.height, own.width).matrix, matrix)


@pytest.mark.parametrize(("size", "frames", "cells"), CLIPS)
def test_boxes(golden: dict[str, np.ndarray], scene: Scene, size: str, frames: int, cells: int) -> None:
    key, own = f"clip_{size}_f{frames}/", published(scene, size, frames)
    np.testing.assert_array_equal(own.box_classes, golden[f"{key}box_classes"][:, 0])
    np.testing.assert_array_equal(own.box_masks, golden[f"{key}box_masks"])
    np.testing.assert_allclose(own.box_corners, golden[f"{key}box_bboxes"][:, 0], rtol=0, atol=4e-6)


def test_exact_corners_are_half_a_height_below_the_published_ones(golden: dict[str, np.ndarray], scene: Scene) -> None:
    own = clip_conditions(scene, Clip("scene", 0, 17), "224x400", np.zeros((17, 4, 4), np.uint8), published=False)
    corners = golden["clip_224x400_f17/box_bboxes"][:, 0].copy()
    for frame, boxes in enumerate(scene.boxes):
        corners[frame, [own.box_ids.index(token) for token in boxes.ids], :, 2] -= boxes.boxes[:, None, 5] / 2
    np.testing.assert_allclose(own.box_corners, corners, rtol=0, atol=4e-6)
    np.testing.assert_array_equal(own.box_masks, golden["clip_224x400_f17/box_masks"])


@pytest.mark.parametrize(("size", "frames", "cells"), CLIPS)
def test_bev_map(golden: dict[str, np.ndarray], meta: dict[str, Any], size: str, frames: int, cells: int) -> None:
    shapes = {**meta["map_polygons"], **meta["map_lines"]}
    paths = [(MAP_LAYERS.index(name), False, np.array(shape, float)) for name in MAP_LAYERS for shape in shapes[name]]

    # Straight lines across the whole map change rows with the last bit of the pose, so build the matrices with
    # pyquaternion like the published pipeline.
    def matrices(name: str) -> np.ndarray:
        rotations = [Quaternion(q).rotation_matrix for q in golden[f"raw/{name}_rotation"]]
        return poses.pose(rotations, golden[f"raw/{name}_translation"])

    packed = golden[f"clip_{size}_f{frames}/bev_packed"]
    bits = rasterise(VectorMap.of(paths), (matrices("ego2global") @ matrices("lidar2ego"))[[0, frames - 1]], cells)
    np.testing.assert_array_equal(unpack(bits), np.unpackbits(packed, axis=-1)[..., :cells])
    assert unpack(bits).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize(("size", "frames", "cells"), CLIPS)
def test_pixels(
    golden: dict[str, np.ndarray], meta: dict[str, Any], tmp_path: Path, size: str, frames: int, cells: int
) -> None:
    key = f"clip_{size}_f{frames}/"
    x, y = np.meshgrid(np.arange(1600), np.arange(900))
    framing = Framing(meta[key]["height"], meta[key]["width"])
    for view, name in enumerate(VIEWS):
        camera = meta["raw_camera_order"].index(name)
        channels = [(7 * (x // 4) + 3 * (y // 4) + 50 * c + 23 * camera) % 256 for c in range(3)]
        Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(tmp_path / "frame.png")
        pixels = (read_picture(tmp_path / "frame.png", framing) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
        np.testing.assert_allclose(pixels.mean(), golden[f"{key}pixel_frame0_view_means"][view], atol=2e-6)
        if view == 0:
            rows = golden[f"{key}pixel_frame0_view0_rows0_8"].transpose(1, 2, 0)
            np.testing.assert_allclose(pixels[:8], rows, atol=2e-7)
