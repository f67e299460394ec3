"""Conditioning-frame masks, against the published generator's examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.diffusion.frame_masks import KINDS, check_ratios, draw_masks
from magicdrive_core.errors import UsageError
from tests.golden.sets import COMPACT, read_arrays

PUBLISHED_NAMES = {"interpolate": "intepolate"}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"random"}))
def test_kinds_draw_the_published_masks(kind: str) -> None:
    golden = read_arrays(COMPACT / "golden_scheduler.npz")[f"mask_examples_T9/{PUBLISHED_NAMES.get(kind, kind)}"]
    rng = np.random.default_rng(0)
    drawn = {tuple(KINDS[kind](9, rng)) for _ in range(400)}
    assert {tuple(row) for row in golden.astype(bool)} <= drawn
    lengths = {sum(row) for row in drawn}
    assert lengths == {int(row.sum()) for row in golden}


@given(st.sampled_from(sorted(KINDS)), st.integers(8, 70), st.integers(0, 2**32))
def test_every_mask_leaves_something_to_generate(kind: str, frames: int, seed: int) -> None:
    mask = KINDS[kind](frames, np.random.default_rng(seed))
    assert mask.shape == (frames,)
    assert mask.dtype == np.bool_
    assert mask.any()


@given(st.integers(8, 40), st.integers(0, 2**32))
def test_quarters_keep_at_most_a_quarter_clean_at_their_ends(frames: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    head, tail, both = (KINDS[f"quarter_{end}"](frames, rng) for end in ("head", "tail", "head_tail"))
    assert 1 <= (~head).sum() <= frames // 4
    assert not head[0]
    assert (~head[: (~head).sum()]).all()
    assert not tail[-1]
    assert tail[0]
    assert (both == both[::-1]).all()


def test_random_masks_are_of_every_density() -> None:
    rng = np.random.default_rng(0)
    share = np.array([KINDS["random"](9, rng).mean() for _ in range(2000)])
    assert share.min() == pytest.approx(1 / 9)
    assert share.max() == 1
    assert 0.45 < share.mean() < 0.6


def test_kinds_come_as_often_as_asked() -> None:
    ratios = {"image_head": 0.2, "image_tail": 0.1}
    masks = draw_masks(ratios, 20_000, 9, np.random.default_rng(1))
    assert (~masks[:, 0]).mean() == pytest.approx(0.2, abs=0.01)
    assert (~masks[:, -1]).mean() == pytest.approx(0.1, abs=0.01)
    assert masks.all(1).mean() == pytest.approx(0.7, abs=0.01)


def test_short_clips_have_no_conditioning_frames() -> None:
    assert draw_masks({"image_head": 1.0}, 5, 7, np.random.default_rng(0)).all()
    assert not draw_masks({"image_head": 1.0}, 5, 8, np.random.default_rng(0))[:, 0].any()


def test_wrong_ratios_are_refused() -> None:
    with pytest.raises(UsageError, match=r"training\.stage2\.mask_ratios: middle is no kind of mask"):
        check_ratios({"middle": 0.1}, "stage2")
    with pytest.raises(UsageError, match=r"sum to 1\.2"):
        check_ratios({"random": 0.7, "image_head": 0.5}, "stage3")
