"""One migrated MLflow database for all tests: creating its tables takes seconds, copying it none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from magicdrive_core.config.schema import Tracking
from magicdrive_core.tracking.runs import Store


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("migrated")
    Store(Tracking(experiment="other"), project)
    return project / "tracking/mlflow.db"


@pytest.fixture
def project(tmp_path: Path, migrated: Path) -> Path:
    (tmp_path / "tracking").mkdir()
    shutil.copy(migrated, tmp_path / "tracking/mlflow.db")
    return tmp_path
