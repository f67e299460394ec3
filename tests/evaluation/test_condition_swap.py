"""Condition swap: one condition of a clip comes from another clip, and all others stay."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.map_cache import write_map
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.evaluation.condition_swap import FIELDS, ClipPainter
from magicdrive_core.inference.items import list_items
from tests.inference.project import STAGE, make_project, small_config, small_scene


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Scene, Scene]:
    """With a second scene, of the same text, that has a map and boxes of its own."""
    folder, config, scene = tmp_path_factory.mktemp("exchange"), small_config(), small_scene()
    make_project(folder, config, scene)
    boxes = np.array([[3.0, 9.0, -1.0, 0.7, 0.8, 1.8, 0.0], [-4.0, 20.0, -1.0, 2.5, 9.0, 3.0, 0.3]])
    other = replace(scene, token="other", boxes=[FrameBoxes(["p", "b"], ["pedestrian", "bus"], boxes)] * len(scene))
    cells = config.conditions.map_cells[config.generate.resolution]
    bits = np.random.default_rng(1).integers(0, 256, (len(scene), cells, cells), dtype=np.uint8)
    write_map(folder / f"artifacts/conditions/bev/{cells}/other.npz", bits)
    return folder, config, scene, other


def draw(project: tuple[Path, Config, Scene, Scene], what: str, *, swap: bool) -> np.ndarray:
    """The first scene's clip."""
    folder, config, scene, other = project
    item = list_items(config, [scene], folder)[0]
    video = ClipPainter(config, folder / STAGE, folder).swapped(item, scene, other if swap else scene, what)
    assert video.shape == (6, item.kept, 32, 64, 3)
    return video


def test_only_the_named_condition_changes_the_picture(project: tuple[Path, Config, Scene, Scene]) -> None:
    own = [draw(project, what, swap=False) for what in FIELDS]
    for one, another in pairwise(own):
        np.testing.assert_array_equal(one, another)
    swapped = {what: draw(project, what, swap=True) for what in FIELDS}
    np.testing.assert_array_equal(swapped["text"], own[0])  # both scenes have the same
    assert (swapped["map"] != own[0]).any()
    assert (swapped["boxes"] != own[0]).any()
    assert (swapped["boxes"] != swapped["map"]).any()


def test_an_edit_that_changes_nothing_gives_the_clip_and_a_removal_another_one(
    project: tuple[Path, Config, Scene, Scene],
) -> None:
    folder, config, scene, _ = project
    item, painter = list_items(config, [scene], folder)[0], ClipPainter(config, folder / STAGE, folder)
    own = draw(project, "map", swap=False)
    np.testing.assert_array_equal(painter.edited(item, scene, Edits()), own)
    assert (painter.edited(item, scene, Edits(drop_nearest_cars=1)) != own).any()
