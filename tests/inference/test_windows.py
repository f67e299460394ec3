"""Windows of a long clip: all of the longest length, evenly overlapping, for any length of the clip."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.items import Window, decoded_frames, item_windows, list_items, plan_windows
from tests.evaluation.stand_in import write_item
from tests.inference.project import small_config, small_scene


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 16), st.booleans())
def test_windows_cover_the_clip(n: int, m: int, overlap: int, conditioned: bool) -> None:
    frames, longest = 8 * n + 1, 8 * m + 1
    overlap = min(overlap, 2 * m)  # fewer latent frames than a window's
    windows = plan_windows(frames, longest, overlap, conditioned=conditioned)
    assert {window.frames for window in windows} == {min(frames, longest)}
    assert windows[0].conditioning_latents == (overlap if conditioned else 0)
    shown = 0
    for number, window in enumerate(windows):
        if number:
            assert overlap <= window.conditioning_latents <= window.frames // 4
            assert window.start + window.conditioning_frames == shown  # new frames start where the window before ended
        shown = window.start + window.frames
    assert shown == frames
    if len(windows) > 1:
        fewer = (len(windows) - 1) * (longest - decoded_frames(overlap)) + decoded_frames(overlap)
        assert fewer < frames  # not one window more than needed


def test_a_full_scene_in_windows_of_33() -> None:
    windows = plan_windows(241, 33, 1)
    assert len(windows) == 8
    assert {window.conditioning_frames for window in windows[1:]} == {1, 5}


def test_a_clip_that_fits_is_one_window() -> None:
    assert plan_windows(17, 33, 1) == plan_windows(17, 17, 1) == [Window(0, 17, 0)]


def test_a_clip_continues_from_the_last_frames_of_an_earlier_generation(tmp_path: Path) -> None:
    folder = tmp_path
    scene = small_scene(60)
    write_item(folder / "outputs/earlier", scene.first_sample, frames=16, scene=scene.token)
    config = small_config(
        "generate.frames=57", "generate.window=33", "generate.initial_latent_frames=2", "generate.generations=1",
        "generate.initial_frames=outputs/earlier", "submission.frames=16",
    )  # fmt: skip
    (item,) = list_items(config, [scene], folder)
    assert (item.initial_frames, item.clip.frames, item.kept) == (16, 52, 52)  # 11 + 41
    assert item_windows(config, item) == [Window(11, 33, 2), Window(19, 33, 7)]
    other = list_items(small_config("generate.frames=57", "generate.generations=1"), [scene])[0]
    assert item.initial_source
    assert not other.initial_source
    with pytest.raises(MagicDriveError, match="cannot continue from 16 initial frames"):
        list_items(small_config("generate.frames=17", "generate.initial_frames=outputs/earlier"), [scene], folder)
    with pytest.raises(MagicDriveError, match=r"item\.json is missing"):
        list_items(small_config("generate.initial_frames=outputs/none"), [scene], folder)
