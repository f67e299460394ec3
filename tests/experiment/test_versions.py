"""When the results of a computation change, its version must be raised: probes are compared with recorded numbers.

To record new numbers after a version was raised: ``RECORD_VERSIONS=1 pytest tests/experiment/test_versions.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from magicdrive_core.config import versions
from magicdrive_core.utils.files import read_json, write_json
from tests.conftest import MakeConfig
from tests.experiment.probes import PROBES, Numbers, Workspace

RECORD = Path(__file__).with_name("recorded_versions.json")
COMMAND = "RECORD_VERSIONS=1 pytest tests/experiment/test_versions.py"
# Of the largest number of a group. CPUs differ by about 1e-5, after a few training steps by 1e-4.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, synthetic_root: Path, make_config: MakeConfig) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("probes"), synthetic_root, make_config)


def numbers_of(names: tuple[str, ...]) -> dict[str, int]:
    return {name: getattr(versions, name) for name in names}


def differing(found: Numbers, recorded: Numbers, tolerance: float = TOLERANCE) -> list[str]:
    """Groups of numbers that are farther apart than rounding, or that only one side has."""

    def close(a: list[float], b: list[float]) -> bool:
        return len(a) == len(b) and np.allclose(a, b, rtol=0, atol=tolerance * max(np.abs([*a, *b, 1e-30])))

    return [name for name in {**found, **recorded} if not close(found.get(name, []), recorded.get(name, []))]


@pytest.mark.parametrize("name", PROBES)
def test_changed_results_have_a_raised_version(name: str, work: Workspace) -> None:
    probe, names = PROBES[name]
    found, now = probe(work), numbers_of(names)
    records = read_json(RECORD) if RECORD.is_file() else {}
    recorded = records.get(name, {"versions": {}, "numbers": {}})
    changed = differing(found, recorded["numbers"])
    if changed and recorded["versions"] == now:
        pytest.fail(
            f"{name}: other results ({', '.join(changed)}) with the same {names[0]}. If this is intended, raise it in "
            f"magicdrive_core/config/versions.py and record the new numbers with: {COMMAND}"
        )
    if "RECORD_VERSIONS" in os.environ:
        if changed or recorded["versions"] != now:
            write_json(RECORD, dict(sorted({**records, name: {"versions": now, "numbers": found}}.items())))
    elif recorded["versions"] != now:
        pytest.fail(f"{name}: recorded with {recorded['versions']}, now {now}; record anew with: {COMMAND}")


def test_every_version_has_a_probe() -> None:
    known = {name for name in vars(versions) if name.endswith("_VERSION")}
    assert known - {"CITY_VERSION"} == {names[0] for _, names in PROBES.values()}


def test_numbers_of_another_formula_differ_and_rounding_does_not() -> None:
    recorded = {"a": [1.0, 200.0], "b": [3.0]}
    assert differing({"a": [1.0, 200.01], "b": [3.0]}, recorded) == []
    assert differing({"a": [1.0, 201.0], "b": [3.0]}, recorded) == ["a"]
    assert differing({"a": [1.0, 200.0]}, recorded) == ["b"]
