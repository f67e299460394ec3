"""Where a training's losses began and ended."""

from __future__ import annotations

import pytest

from magicdrive_core.tracking.summary import first_and_last


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([3.0], (3.0, 3.0)),
        ([3.0, 1.0], (3.0, 1.0)),
        ([4.0, 2.0, 1.0, 1.0], (3.0, 1.0)),  # half of all
        ([2.0] * 8 + [5.0] * 60 + [1.0] * 8, (2.0, 1.0)),  # eight
        ([2.0] * 20 + [5.0] * 160 + [1.0] * 20, (2.0, 1.0)),  # a tenth
    ],
)
def test_ends_of_short_and_long_trainings(losses: list[float], ends: tuple[float, float]) -> None:
    assert first_and_last(losses) == pytest.approx(ends)
