"""Golden samples: equal clips are infinitely close, small differences cost what the formula says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.golden_sample import golden_psnr, write_golden


def test_a_clip_is_equal_to_its_own_golden_sample_and_a_grey_level_away_at_48_db(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 255, (6, 3, 8, 16, 3), np.uint8)
    write_golden(video, tmp_path / "golden.png")
    assert golden_psnr(video, tmp_path / "golden.png") == float("inf")
    assert golden_psnr(video + 1, tmp_path / "golden.png") == pytest.approx(48.13, abs=0.01)
    assert golden_psnr(video[::-1], tmp_path / "golden.png") < 10  # views in another order


def test_a_missing_golden_sample_and_another_size_are_refused(tmp_path: Path) -> None:
    video = np.zeros((6, 1, 8, 16, 3), np.uint8)
    with pytest.raises(MagicDriveError, match="is missing"):
        golden_psnr(video, tmp_path / "golden.png")
    write_golden(video, tmp_path / "golden.png")
    with pytest.raises(MagicDriveError, match=r"another clip: shape \(48, 16, 3\), not \(96, 16, 3\)"):
        golden_psnr(np.concatenate([video, video]), tmp_path / "golden.png")
