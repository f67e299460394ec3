"""Boxes, ground and the panel from above are drawn where geometry puts them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicdrive_core.data.records import CLASSES, MAP_EXTENT, MAP_LAYERS
from magicdrive_core.geometry.boxes import corners, lidar_boxes
from magicdrive_core.geometry.cameras import VIEWS, Framing, project
from magicdrive_core.geometry.poses import inverse, pose, transform
from magicdrive_core.video.overlays import MAP_METRES, bev_panel, box_layer, draw_boxes, draw_ground
from magicdrive_core.video.palette import BACKGROUND, CLASS_COLOURS, LAYER_COLOURS, LAYER_ORDER

FRAMING = Framing(224, 400)
INTRINSICS = np.array([[1260.0, 0, 800], [0, 1260.0, 450], [0, 0, 1]])
# Looks along the lidar's y: columns are the camera's right, down and forward in the lidar frame.
CAMERA_TO_LIDAR = pose(np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), [0.0, 0.5, -0.3])
LIDAR_TO_EGO = pose(np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]), [0.9, 0.0, 1.84])


def box(x: float, y: float, length: float = 4.0, yaw: float = np.pi / 2) -> np.ndarray:
    """A car on the ground at (x, y) of the lidar frame; yaw of its heading from the x axis."""
    return corners(np.array([[x, y, -1.0, 1.8, length, 1.6, -yaw - np.pi / 2]]))


def pixels(points: np.ndarray) -> np.ndarray:
    image, _ = project(transform(inverse(CAMERA_TO_LIDAR), points), INTRINSICS)
    return image * FRAMING.ratio - [0, FRAMING.crop]


def test_colours_exist_for_every_class_and_layer() -> None:
    assert len(CLASS_COLOURS) == len(CLASSES)
    assert len(LAYER_COLOURS) == len(MAP_LAYERS)
    assert sorted(LAYER_ORDER) == list(range(len(MAP_LAYERS)))
    assert MAP_METRES == MAP_EXTENT


@settings(max_examples=30, deadline=None)
@given(st.floats(-6, 6), st.floats(10, 40), st.floats(-3.1, 3.1))
def test_a_box_ahead_covers_exactly_its_projection(x: float, y: float, yaw: float) -> None:
    placed = box(x, y, yaw=yaw)
    layer = box_layer(placed, np.array([0]), INTRINSICS, CAMERA_TO_LIDAR, FRAMING)
    drawn = np.argwhere(layer[..., 3] > 0)[:, ::-1]  # column, row
    low, high = pixels(placed[0]).min(0), pixels(placed[0]).max(0)
    if (low > 3).all() and (high < [397, 221]).all():
        np.testing.assert_allclose(drawn.min(0), low, atol=2.5)
        np.testing.assert_allclose(drawn.max(0) + 1, high, atol=2.5)
    elif len(drawn):  # partly out of the picture: what is seen may end before its corners do
        assert (drawn.min(0) > low - 2.5).all()
        assert (drawn.max(0) + 1 < high + 2.5).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(-8, 8), st.floats(-12, 3), st.floats(1, 30))
def test_boxes_beside_and_behind_the_camera_never_streak_over_the_picture(x: float, y: float, length: float) -> None:
    placed = box(x, y, length)
    layer = box_layer(placed, np.array([2]), INTRINSICS, CAMERA_TO_LIDAR, FRAMING)
    ahead = transform(inverse(CAMERA_TO_LIDAR), placed[0])[:, 2].max()
    if ahead < 0.2:
        assert not layer.any()


def test_the_front_is_marked() -> None:
    """The face at the heading is filled more strongly: seen from behind it is the far one."""
    towards = box_layer(box(0, 15, yaw=-np.pi / 2), np.array([0]), INTRINSICS, CAMERA_TO_LIDAR, FRAMING)
    sideways = box_layer(box(0, 15, yaw=0.0), np.array([0]), INTRINSICS, CAMERA_TO_LIDAR, FRAMING)
    column, row = pixels(np.array([[0.0, 13.0, -1.0]]))[0].astype(int)
    assert towards[row, column, 3] > sideways[row, column, 3] > 0


def test_absent_boxes_are_not_drawn_and_the_frame_is_kept() -> None:
    frame = np.full((224, 400, 3), 99, dtype=np.uint8)
    out = draw_boxes(frame, box(0, 15), np.array([-1]), INTRINSICS, CAMERA_TO_LIDAR, FRAMING)
    np.testing.assert_array_equal(out, frame)
    out = draw_boxes(frame, box(0, 15), np.array([0]), INTRINSICS, CAMERA_TO_LIDAR, FRAMING)
    assert (out != frame).any()
    assert (frame == 99).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(90, 109), st.integers(118, 135))
def test_a_patch_of_the_map_is_painted_at_its_position_on_the_ground(i: int, j: int) -> None:
    bev_map = np.zeros((8, 200, 200), dtype=np.uint8)
    bev_map[0, i - 2 : i + 3, j - 2 : j + 3] = 1
    blank = np.zeros((224, 400, 3), dtype=np.uint8)
    out = draw_ground(blank, bev_map, INTRINSICS, CAMERA_TO_LIDAR, LIDAR_TO_EGO, FRAMING)
    x, y = (np.array([i, j]) + 0.5) * 0.5 - 50
    column, row = pixels(np.array([[x, y, -1.84]]))[0]
    ends = pixels(np.array([[x + dx, y + dy, -1.84] for dx in (-1.25, 1.25) for dy in (-1.25, 1.25)]))
    if ends.min() < 2 or (ends > [398, 222]).any():
        return
    np.testing.assert_allclose(out[int(row), int(column)], LAYER_COLOURS[0], atol=1)
    painted = np.argwhere(out.any(-1))[:, ::-1]
    np.testing.assert_allclose(painted.min(0), ends.min(0), atol=3)  # its corners are slivers
    np.testing.assert_allclose(painted.max(0) + 1, ends.max(0), atol=3)


def test_nothing_is_painted_above_the_horizon() -> None:
    blank = np.zeros((224, 400, 3), dtype=np.uint8)
    everywhere = np.ones((8, 200, 200), dtype=np.uint8)
    out = draw_ground(blank, everywhere, INTRINSICS, CAMERA_TO_LIDAR, LIDAR_TO_EGO, FRAMING)
    horizon = 450 * FRAMING.ratio - FRAMING.crop
    assert np.argwhere(out.any(-1))[:, 0].min() == pytest.approx(horizon + 315 * 1.54 / 49.5, abs=1.5)  # 50 m away


def test_from_above_forward_is_up_and_right_is_right() -> None:
    bev_map = np.zeros((8, 200, 200), dtype=np.uint8)
    bev_map[0, 160:180, 170:190] = 1  # x 30 to 40 m: right; y 35 to 45 m: ahead
    panel = bev_panel(bev_map, box(-20, 30), np.array([3]), 400)
    assert panel.shape == (400, 400, 3)
    assert tuple(panel[40, 340]) == LAYER_COLOURS[0]
    assert tuple(panel[360, 340]) == BACKGROUND
    red, green, blue = panel[80, 120].astype(int)  # the bus
    assert red > green
    assert red > blue
    assert panel[200, 200].min() > 200  # the ego car


def test_boxes_of_a_real_key_frame_fall_on_the_recorded_pixels(shared: Path) -> None:
    """The layer's boxes surround the centres that another toolbox recorded for this frame."""
    root = shared / "data/nuscenes-one"
    tables = {f.stem: json.loads(f.read_text()) for f in (root / "v1.0-one").glob("*.json")}
    by_token = {name: {row["token"]: row for row in rows} for name, rows in tables.items()}
    records = {}
    for row in tables["sample_data"]:
        calibrated = by_token["calibrated_sensor"][row["calibrated_sensor_token"]]
        records[by_token["sensor"][calibrated["sensor_token"]]["channel"]] = (
            calibrated,
            by_token["ego_pose"][row["ego_pose_token"]],
        )

    def to_global(channel: str) -> np.ndarray:
        sensor, ego = records[channel]
        return pose(ego["rotation"], ego["translation"]) @ pose(sensor["rotation"], sensor["translation"])

    notes = tables["sample_annotation"]
    boxes = lidar_boxes(
        [n["translation"] for n in notes],
        [n["rotation"] for n in notes],
        [n["size"] for n in notes],
        inverse(to_global("LIDAR_TOP")),
    )
    framing, seen = Framing(450, 800), 0
    for view in VIEWS:
        intrinsics = np.array(records[view][0]["camera_intrinsic"])
        camera_to_lidar = inverse(to_global("LIDAR_TOP")) @ to_global(view)
        for row in boxes:
            centre = transform(inverse(camera_to_lidar), row[:3])
            image, depth = project(centre, intrinsics)
            column, line = image * framing.ratio - [0, framing.crop]
            if depth < 3 or not (20 < column < 780 and 20 < line < 430):
                continue
            layer = box_layer(corners(row[None]), np.array([0]), intrinsics, camera_to_lidar, framing)
            assert layer[int(line), int(column), 3] > 0, (view, row)
            seen += 1
    assert seen > 60


def test_the_panel_needs_no_box() -> None:
    nothing = bev_panel(np.zeros((8, 50, 50), dtype=np.uint8), np.zeros((0, 8, 3)), np.zeros(0, dtype=int), 100)
    assert nothing.shape == (100, 100, 3)
    assert box_layer(
        np.zeros((0, 8, 3)), np.zeros(0, int), INTRINSICS, CAMERA_TO_LIDAR, FRAMING
    ).any() == pytest.approx(0)
