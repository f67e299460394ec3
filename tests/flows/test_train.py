"""Flow `train`, really run: impossible settings start nothing; a stage is trained and recorded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.train import train
from magicdrive_core.config import load_config
from magicdrive_core.errors import UsageError
from magicdrive_core.places import find_places
from magicdrive_core.tracking.runs import PARENT, Store
from tests.projects import copy_project


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one waits for `dvc repro`
def test_a_stage_is_trained_once_and_recorded(
    prefect_api: str, reproduced_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_project(reproduced_project, tmp_path / "project")
    monkeypatch.chdir(project)
    with pytest.raises(UsageError, match="no training clip"):
        train("stage1", overrides=["training.stage1.buckets=[{size: 112x200, frames: 65, batch: 1}]"])
    assert not (project / "runs").exists()
    assert not (project / "tracking").exists()
    folder = Path(train("stage1"))
    assert find_places(load_config(), "stage1").model.done
    store = Store(load_config().tracking)
    child, parent = store.client.search_runs([store.experiment])  # the latest first
    assert child.data.tags[PARENT] == parent.info.run_id
    assert {run.info.status for run in (child, parent)} == {"FINISHED"}
    assert "prefect.flow_run" in parent.data.tags
    assert child.data.params["training.steps"] == "2"
    weights = (folder / "ema.safetensors").stat()
    assert Path(train("stage1")) == folder
    assert (folder / "ema.safetensors").stat() == weights
    assert len(store.client.search_runs([store.experiment])) == 2
