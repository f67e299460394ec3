"""Corners and conversions of boxes equal those of the devkit's ``Box``."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from nuscenes.utils.data_classes import Box
from pyquaternion import Quaternion

from magicdrive_core.geometry import boxes, poses

angles = st.floats(-np.pi, np.pi)
metres = st.floats(-80, 80)
sizes = st.floats(0.1, 20)


@given(metres, metres, metres, sizes, sizes, sizes, angles)
def test_corners_equal_those_of_the_devkit(
    x: float, y: float, z: float, width: float, length: float, height: float, yaw: float
) -> None:
    devkit = Box([x, y, z], [width, length, height], Quaternion(axis=[0, 0, 1], angle=yaw)).corners().T
    ours = boxes.corners(np.array([[x, y, z, width, length, height, -yaw - np.pi / 2]]))[0]
    distances = np.linalg.norm(devkit[:, None] - ours[None], axis=-1)
    assert distances.min(0).max() < 1e-9
    assert distances.min(1).max() < 1e-9


def test_published_corners_are_half_a_height_too_high() -> None:
    row = np.array([[1.0, 2.0, 3.0, 2.0, 4.0, 1.5, 0.4]])
    difference = boxes.corners(row, published=True) - boxes.corners(row)
    np.testing.assert_allclose(difference[0], np.tile([0, 0, 0.75], (8, 1)), atol=1e-15)


@given(metres, metres, angles, angles)
def test_boxes_have_their_heading_in_the_lidar_frame(x: float, y: float, heading: float, lidar_heading: float) -> None:
    lidar_to_global = poses.pose([np.cos(lidar_heading / 2), 0, 0, np.sin(lidar_heading / 2)], [x, y, 1.8])
    rotation = [[np.cos(heading / 2), 0, 0, np.sin(heading / 2)]]
    row = boxes.lidar_boxes([[10.0, 20.0, 1.0]], rotation, [[2, 4, 1.5]], poses.inverse(lidar_to_global))[0]
    np.testing.assert_allclose(poses.transform(lidar_to_global, row[:3]), [10, 20, 1], atol=1e-9)
    turned = -row[6] - np.pi / 2 - (heading - lidar_heading)
    np.testing.assert_allclose([np.cos(turned), np.sin(turned)], [1, 0], atol=1e-9)


def test_no_boxes_give_no_rows() -> None:
    assert boxes.lidar_boxes([], [], [], np.eye(4)).shape == (0, 7)
    assert boxes.corners(np.zeros((0, 7))).shape == (0, 8, 3)
