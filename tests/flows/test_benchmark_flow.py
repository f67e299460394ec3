"""Runs the deployment benchmark/wcoda: from a registered model to a validated submission and a score sheet."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from flows import server
from magicdrive_core.config.schema import Tracking
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.tracking.runs import Store
from magicdrive_core.utils.files import read_json
from tests.conftest import PROJECT
from tests.inference.project import STAGE, make_project, small_config, small_scene

POOL = "benchmark-test"
MODEL = "models:/magicdrive-demo@champion"
SETTINGS = [
    *("generate.generations=1", "generate.frames=17", "generate.task_runner=dask", "generate.steps=1"),
    *("submission.frames=16", "submission.team=owls"),
]


def lay_out(project: Path) -> None:
    """A project whose trained network is registered, with a real picture for each view."""
    config = small_config(*SETTINGS)
    make_project(project, config, small_scene(18))
    (project / "params.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    (project / "flows").symlink_to(PROJECT / "flows")
    (project / "prefect.yaml").symlink_to(PROJECT / "prefect.yaml")
    rng = np.random.default_rng(0)
    (project / "data/samples").mkdir(parents=True)
    for view in VIEWS:
        blotches = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8))
        blotches.resize((400, 225)).save(project / f"data/samples/{view}.jpg")
    store, run = Store(Tracking(), project), read_json(project / STAGE / "run.json")
    weights = project / STAGE / "ema.safetensors"
    store.register("magicdrive-demo", "champion", weights, run["weights_sha256"], store.open("stage3", {}))


def prefect(project: Path, api: str, *words: str) -> None:
    environment = os.environ | {
        "PREFECT_API_URL": api,
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "PWD": str(project),
    }
    command = [str(Path(sys.executable).with_name("prefect")), "--no-prompt", *words]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_registered_model_becomes_a_valid_submission_with_scores(prefect_api: str, project: Path) -> None:
    """A worker runs the deployment; a Dask cluster that exists as long as the flow makes the items."""
    lay_out(project)
    with get_client(sync_client=True) as client:
        template = read_json(server.TEMPLATE)
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        prefect(project, prefect_api, "deploy", "--name", "wcoda", "--pool", POOL)
        deployment = client.read_deployment_by_name("benchmark/wcoda")
        overrides = {"overrides": [f"generate.weights={MODEL}"]}
        run = client.create_flow_run_from_deployment(deployment.id, parameters=overrides)
        prefect(project, prefect_api, "worker", "start", "--pool", POOL, "--run-once")
        state = client.read_flow_run(run.id).state
        assert state
        assert state.is_completed(), state.message

    (folder,) = (project / "outputs").glob("submission-*")
    with zipfile.ZipFile(folder / "results.zip") as archive:
        assert len(archive.namelist()) == 6
    assert read_json(folder / "validation.json")["faults"] == []
    assert {"small_224", "small_212"} <= read_json(folder / "scores.json")["figures"].keys()
    assert (folder / "report.html").is_file()
    weights = read_json(project / STAGE / "run.json")["weights_sha256"]
    tags = {"model": "models:/magicdrive-demo/1", "model.sha256": weights}
    assert tags.items() <= read_json(folder / "manifest.json")["lineage"].items()
    recorded = Store(Tracking(), project).client.get_run(read_json(folder / "mlflow.json")["run"])
    assert tags.items() <= recorded.data.tags.items()
    assert {"small_224", "small_212"} <= recorded.data.metrics.keys()
