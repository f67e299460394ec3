"""Rigid motions and quaternions: conversion, inversion and interpolation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyquaternion import Quaternion

from magicdrive_core.geometry import poses

finite = st.floats(-50, 50)
quaternions = arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 0.1)
vectors = arrays(np.float64, 3, elements=finite)


@given(quaternions)
def test_rotation_matrices_equal_those_of_pyquaternion(q: np.ndarray) -> None:
    np.testing.assert_allclose(poses.rotation_matrix(q), Quaternion(q).normalised.rotation_matrix, atol=1e-12)


@given(quaternions, vectors, vectors)
def test_inverse_transforms_points_back(q: np.ndarray, translation: np.ndarray, point: np.ndarray) -> None:
    matrix = poses.pose(q, translation)
    np.testing.assert_allclose(poses.transform(poses.inverse(matrix), poses.transform(matrix, point)), point, atol=1e-9)
    np.testing.assert_allclose(poses.inverse(matrix) @ matrix, np.eye(4), atol=1e-10)


@given(quaternions, quaternions, st.floats(0, 1))
def test_slerp_divides_the_shorter_arc(start: np.ndarray, end: np.ndarray, fraction: float) -> None:
    def angle(a: np.ndarray, b: np.ndarray) -> float:
        return 2 * np.arccos(np.clip(abs(a @ b), 0, 1))

    a, b = start / np.linalg.norm(start), end / np.linalg.norm(end)
    middle = poses.slerp(start, end, fraction)
    assert np.linalg.norm(middle) == 1.0 or abs(np.linalg.norm(middle) - 1) < 1e-12
    assert abs(angle(a, middle) - fraction * angle(a, b)) < 1e-6
    assert abs(angle(b, middle) - (1 - fraction) * angle(a, b)) < 1e-6


@given(quaternions)
def test_slerp_between_equal_rotations_is_constant(q: np.ndarray) -> None:
    unit = q / np.linalg.norm(q)
    np.testing.assert_allclose(poses.slerp(q, q, 0.3), unit, atol=1e-15)
    np.testing.assert_allclose(np.abs(poses.slerp(q, -q, 0.3) @ unit), 1.0, atol=1e-12)


def test_slerp_of_a_batch_equals_single_calls() -> None:
    rng = np.random.default_rng(0)
    start, end, fraction = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.random(5)
    batch = poses.slerp(start, end, fraction)
    for index in range(5):
        np.testing.assert_allclose(batch[index], poses.slerp(start[index], end[index], fraction[index]), atol=1e-15)


@given(quaternions, quaternions)
def test_quaternions_survive_the_round_trip_and_multiply_like_matrices(a: np.ndarray, b: np.ndarray) -> None:
    matrix = poses.rotation_matrix(a)
    back = poses.quaternion(matrix)
    assert back[0] >= 0
    np.testing.assert_allclose(poses.rotation_matrix(back), matrix, atol=1e-12)
    np.testing.assert_allclose(
        poses.rotation_matrix(poses.multiply(a, b)), matrix @ poses.rotation_matrix(b), atol=1e-12
    )
