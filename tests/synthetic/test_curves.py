"""Curves satisfy their differential equation, offsets, joining and mirroring."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.synthetic.curves import Curve

pieces = st.lists(st.tuples(st.floats(0.5, 80), st.sampled_from([0.0, 0.05, -0.1, 1e-9])), min_size=1, max_size=4)
curves = st.builds(
    Curve,
    start=st.tuples(st.floats(-500, 500), st.floats(-500, 500), st.floats(-3, 3)),
    pieces=pieces.map(tuple),
)


@given(curve=curves, share=st.floats(0.01, 0.99))
def test_poses_move_at_unit_speed_along_their_heading(curve: Curve, share: float) -> None:
    s, h = share * curve.length, 1e-4
    before, at, after = curve.poses([s - h, s, s + h])
    np.testing.assert_allclose((after - before)[:2] / (2 * h), [np.cos(at[2]), np.sin(at[2])], atol=1e-4)


@given(curve=curves, offset=st.floats(-3, 3))
def test_an_offset_moves_poses_to_the_right(curve: Curve, offset: float) -> None:
    middle, shifted = (curve.poses([curve.length / 2], o)[0] for o in (0.0, offset))
    right = [np.sin(middle[2]), -np.cos(middle[2])]
    np.testing.assert_allclose((shifted - middle)[:2], np.array(right) * offset, atol=1e-9)


@given(curve=curves, other=curves)
def test_a_joined_curve_continues_at_the_end_of_the_first(curve: Curve, other: Curve) -> None:
    continued = Curve(curve.end, other.pieces)
    joined = curve.joined(other)
    np.testing.assert_allclose(joined.end, continued.end, atol=1e-6)


@given(curve=curves)
def test_mirroring_turns_left_into_right(curve: Curve) -> None:
    mirrored = curve.transformed(True, 0.0, (0.0, 0.0))
    np.testing.assert_allclose(
        mirrored.poses([curve.length / 3]), curve.poses([curve.length / 3]) * [1, -1, -1], atol=1e-6
    )
