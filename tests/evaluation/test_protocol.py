"""Crops, the score's formula and the published table, as the track's page and evaluator have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.evaluation.protocol import BASELINE, CROPS, REDUCED, RESULTS, framed, reduced, score


def test_the_published_scores_follow_from_their_figures() -> None:
    with_score = [result for result in RESULTS if result.score is not None]
    assert len(with_score) == 5
    a, b, c = BASELINE.fvd, BASELINE.mean_ap, BASELINE.mean_iou
    rounding = 0.005 / a + 0.005 / b + 0.005 / c + 0.00005  # figures are published with two decimals, scores with four
    for result in with_score:
        ours = score(result.fvd, result.mean_ap, result.mean_iou)
        assert ours == pytest.approx(result.score, abs=rounding), result.team


@given(st.floats(1, 1000), st.floats(0, 100), st.floats(0, 100))
def test_every_part_pulls_the_right_way(fvd: float, mean_ap: float, mean_iou: float) -> None:
    here = score(fvd, mean_ap, mean_iou)
    assert score(fvd + 1, mean_ap, mean_iou) < here < score(fvd, mean_ap + 1, mean_iou)
    assert here < score(fvd, mean_ap, mean_iou + 1)
    assert score(BASELINE.fvd, BASELINE.mean_ap, BASELINE.mean_iou) == 0


def clip() -> np.ndarray:
    """Row and column of each pixel in its colours."""
    rows, columns = np.mgrid[: REDUCED[0], : REDUCED[1]]
    return np.stack([rows, columns // 2, np.zeros_like(rows)], axis=-1).astype(np.uint8)[None]


def test_the_crop_of_224_rows_only_cuts() -> None:
    out = framed(clip(), CROPS["fvd_224"])
    assert (out.shape, out.dtype) == ((3, 1, 224, 224), np.float32)
    back = np.rint((out + 1) * 127.5).astype(int)
    assert (back[0, 0, 0, 0], back[0, 0, -1, 0]) == (1, 224)  # the top row of 225 is gone
    assert (back[1, 0, 0, 0], back[1, 0, 0, -1]) == (88 // 2, 311 // 2)  # the central columns


def test_the_crop_of_212_rows_enlarges_as_torch_does() -> None:
    out = framed(clip(), CROPS["fvd_212"])
    kept = torch.from_numpy(clip()[:, -212:].astype(np.float32)).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(kept, size=(224, 423), mode="bilinear", align_corners=False)
    expected = wide[0, :, :, 99:323].numpy() / 127.5 - 1
    np.testing.assert_allclose(out[:, 0], expected, atol=2e-4)


def test_a_black_band_is_seen_by_one_crop_and_not_by_the_other() -> None:
    picture = np.full((900, 1600, 3), 200, np.uint8)
    banded = picture.copy()
    banded[:52] = 0
    small = np.stack([reduced(picture), reduced(banded)])
    assert not np.array_equal(*framed(small, 224).transpose(1, 0, 2, 3))
    below = 225 - 13 - 2  # the bicubic filter reaches two rows beyond the band
    np.testing.assert_array_equal(*framed(small, below).transpose(1, 0, 2, 3))
    assert (framed(small, 224)[0, 1, :11] == -1).all()
