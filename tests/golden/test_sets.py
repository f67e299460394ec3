"""The compact golden set: small enough for the repository, and the same numbers as the full one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden.compact import FILES, TILE_STEP
from tests.golden.sets import COMPACT, FULL, read_arrays

LIMIT = 8_000_000  # bytes


def test_the_compact_set_stays_small() -> None:
    assert sum(file.stat().st_size for file in COMPACT.glob("*") if file.is_file()) <= LIMIT


if FULL.is_dir():

    @pytest.mark.parametrize("name", FILES)
    def test_the_compact_set_holds_the_numbers_of_the_full_one(name: str) -> None:
        expected, kept = (
            FILES[name](read_arrays(FULL / f"golden_{name}.npz")),
            read_arrays(COMPACT / f"golden_{name}.npz"),
        )
        if name == "vae":
            assert json.loads(bytes(kept.pop("__meta_json__")))["tile_step"] == TILE_STEP
            del expected["__meta_json__"]
        assert list(kept) == list(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(kept[key], array, strict=True, err_msg=key)
