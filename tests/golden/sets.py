"""The golden sets: the compact one of this folder, and the full one in a folder `shared` beside the checkout."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

COMPACT = Path(__file__).parent
FULL = COMPACT.parents[2] / "shared" / "golden"
SETS = {"compact": COMPACT} | ({"full": FULL} if FULL.is_dir() else {})

Arrays = dict[str, np.ndarray]


def read_arrays(path: Path) -> Arrays:
    """Read the arrays of a golden file of either set; ``compact.pack`` joins those of the compact one."""
    with np.load(path) as file:
        stored = dict(file)
    if "__layout__" not in stored:
        return stored
    arrays, taken = {}, Counter[str]()
    for name, dtype, shape in json.loads(bytes(stored["__layout__"])):
        count = int(np.prod(shape))
        arrays[name] = stored[dtype][taken[dtype] : taken[dtype] + count].reshape(shape)
        taken[dtype] += count
    return arrays


def settings(arrays: Arrays) -> dict[str, Any]:
    """Return the settings that a golden file holds."""
    return json.loads(bytes(arrays["__meta_json__"]))


def model_card() -> dict[str, Any]:
    """Return the published XL networks' names, shapes and counts."""
    return json.loads(gzip.decompress((COMPACT / "model_card.json.gz").read_bytes()))
