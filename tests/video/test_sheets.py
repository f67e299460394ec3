"""Grids and sheets hold every view at its position."""

from __future__ import annotations

import numpy as np
import pytest

from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.video.sheets import contact_sheet, resize, six_views, view_title

SHADES = np.stack([np.full((90, 160, 3), 40 * view + 20, dtype=np.uint8) for view in range(6)])


def test_views_are_arranged_as_around_the_car() -> None:
    sheet = six_views(SHADES)
    titles = [[view_title(VIEWS[round((int(sheet[y, x, 0]) - 20) / 40)]) for x in (80, 242, 404)] for y in (60, 152)]
    assert titles == [["front left", "front", "front right"], ["back left", "back", "back right"]]


@pytest.mark.parametrize("width", [None, 100, 240, 480])
def test_a_grid_can_be_a_frame_of_a_video(width: int | None) -> None:
    height, columns, _ = six_views(SHADES, width).shape
    assert height % 2 == columns % 2 == 0


def test_a_grid_of_layers_stays_clear_where_they_are() -> None:
    layers = np.zeros((6, 90, 160, 4), dtype=np.uint8)
    layers[1, 45, 80] = 255
    grid = six_views(layers, captions=False)
    assert grid.shape == (*six_views(SHADES).shape[:2], 4)
    assert np.argwhere(grid[..., 3]).tolist() == [[45, 80 + 160 + 2]]


def test_captions_only_touch_a_corner() -> None:
    plain, titled = six_views(SHADES, captions=False), six_views(SHADES)
    rows, columns = np.argwhere((plain != titled).any(-1)).T
    assert ((rows % 92) < 30).all()
    assert ((columns % 162) < 110).all()


def test_resizing_keeps_proportions() -> None:
    frame = SHADES[0]
    assert resize(frame, 160) is frame
    assert resize(frame, 128).shape == (72, 128, 3)
    assert resize(frame, 1600).shape == (900, 1600, 3)


def test_a_contact_sheet_holds_every_picture() -> None:
    rows = [[SHADES[0], SHADES[1]], [SHADES[2], SHADES[3]], [SHADES[4], SHADES[5]]]
    bare = contact_sheet(rows, ())
    full = contact_sheet(rows, ("a", "b", "c"), ("one", "two"), "title", "subtitle")
    for sheet in (bare, full):
        for shade in range(6):
            assert (sheet == 40 * shade + 20).all(-1).sum() >= 90 * 160
    assert full.shape[0] > bare.shape[0]
    assert full.shape[1] > bare.shape[1]
