"""Framing of pictures, projection, and the ring of cameras."""

from __future__ import annotations

import numpy as np
import pytest

from magicdrive_core.geometry.cameras import VIEWS, Framing, project, ring_neighbours


@pytest.mark.parametrize(
    ("height", "width", "ratio", "crop"), [(224, 400, 0.25, 1), (424, 800, 0.5, 26), (848, 1600, 1.0, 52)]
)
def test_framing_of_the_published_sizes(height: int, width: int, ratio: float, crop: int) -> None:
    framing = Framing(height, width)
    assert (framing.ratio, framing.crop) == (ratio, crop)
    np.testing.assert_array_equal(framing.matrix @ [100, 900, 0, 1], [100 * ratio, 900 * ratio - crop, 0, 1])


def test_ring_neighbours_are_closed_and_mutual() -> None:
    neighbours = ring_neighbours(len(VIEWS))
    assert neighbours[0] == (5, 1)
    assert neighbours[5] == (4, 0)
    for view, (left, right) in enumerate(neighbours):
        assert neighbours[left][1] == view == neighbours[right][0]


def test_projection_of_the_optical_axis_is_the_principal_point() -> None:
    intrinsics = np.array([[1266.0, 0, 816], [0, 1266, 491], [0, 0, 1]])
    pixels, depth = project(np.array([[0, 0, 10.0], [1, 0, 10.0]]), intrinsics)
    np.testing.assert_allclose(pixels, [[816, 491], [816 + 126.6, 491]])
    np.testing.assert_allclose(depth, [10, 10])
