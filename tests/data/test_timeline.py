"""Interpolated and extrapolated objects are close to the annotations of held-back key frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.held_back import PAIRED, UNPAIRED, angles, held_back
from magicdrive_core.data.nuscenes_scenes import build_scene
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.data.timeline import Objects, extrapolate
from magicdrive_core.geometry.poses import slerp


def objects(**positions: tuple[float, float]) -> Objects:
    count = len(positions)
    return Objects(
        ids=list(positions),
        names=["car"] * count,
        centres=np.array([[*position, 0.0] for position in positions.values()]).reshape(-1, 3),
        rotations=np.tile([1.0, 0, 0, 0], (count, 1)),
        sizes=np.ones((count, 3)),
    )


def test_a_real_drive_is_interpolated_to_centimetres(shared: Path) -> None:
    result = held_back(load_tables(shared / "data/nuscenes-drive", "v1.0-drive"))
    errors = {(entry.kind, entry.name): entry for entry in result.errors}
    paired, unpaired = errors[PAIRED, "all"], errors[UNPAIRED, "all"]
    assert paired.count + unpaired.count <= result.annotated
    assert paired.count > 1000
    assert unpaired.count > 40
    assert np.median(paired.metres) < 0.02
    assert np.quantile(paired.metres, 0.95) < 0.2
    assert np.quantile(paired.degrees, 0.95) < 1.5
    assert np.median(unpaired.metres) < 0.1
    assert paired.count == sum(
        entry.count for (kind, name), entry in errors.items() if kind == PAIRED and name != "all"
    )


def test_extrapolated_objects_keep_their_velocity_or_stand_still() -> None:
    earlier, here, gone = (
        objects(moving=(0, 0)),
        objects(moving=(2, 0), new=(5, 5), stays=(1, 1)),
        objects(stays=(1, 1)),
    )
    carried = extrapolate(here, gone, earlier, 0.5)
    assert carried.ids == ["moving", "new"]
    np.testing.assert_allclose(carried.centres, [[3, 0, 0], [5, 5, 0]])
    assert extrapolate(here, gone, None, 0.5).centres.tolist() == [[2, 0, 0], [5, 5, 0]]


@pytest.mark.parametrize("published", [False, True])
def test_unpaired_objects_are_shown_in_the_nearer_half_on_request(shared: Path, published: bool) -> None:
    tables = load_tables(shared / "data/nuscenes-drive", "v1.0-drive")
    plain = build_scene(tables, tables.scene[0], "both", published=published)
    carried = build_scene(tables, tables.scene[0], "both", published=published, extrapolate_unpaired=True)
    added = 0
    for frame, (few, more) in enumerate(zip(plain.boxes, carried.boxes, strict=True)):
        new = set(more.ids) - set(few.ids)
        key = frame - frame % 6 if frame % 6 <= 3 else frame - frame % 6 + 6
        assert new <= set(plain.boxes[key].ids)
        assert more.ids[: len(few.ids)] == few.ids
        np.testing.assert_array_equal(more.boxes[: len(few.ids)], few.boxes)
        added += len(new)
    assert (added == 0) == published


quaternions = st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1)


@given(quaternions, quaternions, st.floats(0.01, 1))
def test_angles_grow_along_the_arc_whatever_the_signs(a: list[float], b: list[float], share: float) -> None:
    start, end = np.array([a]), np.array([b])
    whole = angles(start, end)
    assert 0 <= whole[0] <= 180 + 1e-9
    np.testing.assert_allclose(angles(-start, end), whole, atol=1e-6)
    np.testing.assert_allclose(angles(start, slerp(start, end, np.array([share]))), share * whole, atol=1e-5)
