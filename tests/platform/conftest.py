"""The project that the tests of DVC's stages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.projects import reproduced


@pytest.fixture(scope="session")
def reproduced_project(tmp_path_factory: pytest.TempPathFactory, worker_id: str, synthetic_root: Path) -> Path:
    """A project in which `dvc repro` was run. Not to be changed."""
    base = tmp_path_factory.getbasetemp()
    return reproduced(base if worker_id == "master" else base.parent, synthetic_root)
