"""Runs the flow `train`: what it records when it finishes, when a rank fails and when it is terminated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.train import train
from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Tracking
from magicdrive_core.data.infos import build_infos
from magicdrive_core.errors import UsageError
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.tracking.runs import PARENT, Store
from magicdrive_core.utils.files import write_json
from tests.conftest import PROJECT
from tests.flows.test_children import assert_gone, family
from tests.projects import copy_project, readable_by_others

# The flow and the launcher are real; a rank notes its process id and its agent's, then does what the test says.
FLOW = """
from flows.train import train
from magicdrive_core.launch import launcher
run_group = launcher.run_group
launcher.run_group = lambda command, ranks, **options: run_group(["rank.py"], 1, **options)
train("stage1")
"""
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # saved; to be restarted
with open("pids", "a") as file: print(os.getpid(), os.getppid(), file=file)
"""


@pytest.mark.parametrize(("rank", "status"), [("time.sleep(300)", "KILLED"), ("sys.exit(3)", "FAILED")])
def test_mlflow_records_how_a_training_ended(
    prefect_api: str, project: Path, synthetic_root: Path, rank: str, status: str
) -> None:
    """Prefect turns SIGTERM into its own exception, which must close parent and child run as killed."""
    text = (PROJECT / "profiles/demo.yaml").read_text()
    text = text.replace("root: data", f"root: {synthetic_root}")
    secrets = "cluster: {environment: {ACCESS: swordfish}, slurm: {setup: [export TOKEN=swordfish]}, "
    (project / "params.yaml").write_text(text.replace("cluster: {", secrets))
    (project / "rank.py").write_text(RANK + rank)
    build_infos(load_config(project / "params.yaml"), project / "artifacts/infos")
    write_json(project / "artifacts/encoders/encoders.json", {"vae": {"latent_channels": 8}, "text": {"width": 64}})
    environment = os.environ | {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, "-c", FLOW], cwd=project, env=environment) as flow:
        try:
            pids = family(project / "pids")
            if status == "KILLED":
                flow.terminate()
            assert flow.wait(90) != 0
        finally:
            flow.kill()
    assert family(project / "pids") == pids  # nothing was started again
    assert_gone(pids)
    store = Store(Tracking(), project)
    child, parent = store.client.search_runs([store.experiment])  # the latest first
    assert child.data.tags[PARENT] == parent.info.run_id
    assert (parent.info.status, child.info.status) == (status, status)
    assert parent.data.params["cluster.environment.ACCESS"] == parent.data.params["cluster.slurm.setup"] == "***"
    assert readable_by_others(project, "swordfish") == [project / "params.yaml"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one waits for `dvc repro`
def test_a_stage_is_trained_once_and_recorded(
    prefect_api: str, reproduced_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_project(reproduced_project, tmp_path / "project")
    monkeypatch.chdir(project)
    with pytest.raises(UsageError, match="no training clip"):
        train("stage1", overrides=["training.stage1.buckets=[{resolution: 80x144, frames: 65, batch: 1}]"])
    assert not (project / "runs").exists()
    assert not (project / "tracking").exists()
    folder = Path(train("stage1"))
    assert find_run_paths(load_config(), "stage1").model.done
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
