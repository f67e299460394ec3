"""Fixtures that every room's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from magicdrive_core.config.schema import Synth
from magicdrive_core.synthetic.dataset import synthesize

PROJECT = Path(__file__).resolve().parents[1]

# A busy machine is no fault of the code: properties are judged by what they say, not by how long an example takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of measured reference data beside the checkout."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the reference data folder ../shared is not here")
    return folder


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A small generated data root, version v1.0-demo: two scenes (day, night) of 1.5 s. Tests must not change it."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # shared by the workers of pytest-xdist
    root = folder / "synthetic"
    with FileLock(folder / "synthetic.lock"):
        synthesize(Synth(seed=7, scenes=2, seconds=1.5), root, "v1.0-demo")
    return root


@pytest.fixture(scope="session")
def reproduced_project(tmp_path_factory: pytest.TempPathFactory, worker_id: str, synthetic_root: Path) -> Path:
    """A small project in which `dvc repro` was run. Tests must not change it: ``projects.copy_project``."""
    from tests.projects import reproduced

    base = tmp_path_factory.getbasetemp()
    return reproduced(base if worker_id == "master" else base.parent, synthetic_root)
