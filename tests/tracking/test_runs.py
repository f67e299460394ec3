"""Runs in a real MLflow database."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Tracking
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.runs import (
    PARENT,
    Entry,
    Store,
    best_effort,
    close_parent,
    first_and_last,
    flatten,
    log_submission,
    open_parent,
)

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(PROFILE)


def test_a_training_is_a_parent_with_children(project: Path, config: Config) -> None:
    parent = open_parent(config, "train-demo", project)
    store = Store(config.tracking, project)
    child = store.open("stage1", {"stage": "stage1"}, parent)
    store.params(child, {"training": {"max_grad_norm": 1.0, "betas": [0.9, 0.999]}})
    store.close(child, "FINISHED", weights_sha256="ab")
    close_parent(config, parent, "FINISHED", project)

    runs = store.client.search_runs([store.experiment], f"tags.`{PARENT}` = '{parent}'")
    assert [run.info.run_id for run in runs] == [child]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"training.max_grad_norm": "1.0", "training.betas": "[0.9, 0.999]"}
    assert runs[0].data.tags["weights_sha256"] == "ab"
    whole = store.client.get_run(parent)
    assert whole.data.params["training.stage1.steps"] == str(config.training.stage1.steps)
    assert whole.data.tags["profile"] == "demo"


def test_a_resume_with_another_value_tags_it(project: Path) -> None:
    store = Store(Tracking(), project)
    run = store.open("stage1", {})
    store.params(run, {"cluster": {"ranks": 2, "threads": 1}})
    store.close(run, "KILLED")
    assert store.reopen(run, parent="0" * 32)
    store.params(run, {"cluster": {"ranks": 4, "threads": 1}})
    data = store.client.get_run(run)
    assert data.info.status == "RUNNING"
    assert data.data.params == {"cluster.ranks": "2", "cluster.threads": "1"}
    assert data.data.tags["resumed.cluster.ranks"] == "4"
    assert "resumed.cluster.threads" not in data.data.tags
    assert data.data.tags[PARENT] == "0" * 32


def test_a_run_that_the_database_does_not_know_is_not_resumed(project: Path) -> None:
    store = Store(Tracking(), project)
    assert not store.reopen("f" * 32, None)
    deleted = store.open("stage1", {})
    store.client.delete_run(deleted)
    assert not store.reopen(deleted, None)


def test_entries_that_are_there_already_are_not_doubled(project: Path) -> None:
    store = Store(Tracking(), project)
    run = store.open("stage1", {})
    entries = [Entry(step, 1e9 + step, {"loss": 1 / step, "loss/112x200-9": 2.0}) for step in range(1, 401)]
    store.log_entries(run, entries[:300])
    store.log_entries(run, entries[200:])
    history = store.client.get_metric_history(run, "loss")
    assert [metric.step for metric in history] == list(range(1, 401))
    assert (history[-1].value, history[-1].timestamp) == (1 / 400, 1_000_000_400_000)
    assert store.steps_of(run, "loss") == set(range(1, 401))
    assert store.steps_of(run, "none") == set()


def test_best_effort_returns_the_result_or_warns_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise ValueError("a driver's message\nof two lines: postgresql://me:swordfish@host/db")

    assert best_effort("this is not logged", lambda: "ab") == "ab"
    assert best_effort("this is not logged", fail) is None
    started = time.monotonic()
    assert best_effort("this is not logged", threading.Event().wait, seconds=0.05) is None
    assert time.monotonic() - started < 5
    assert caplog.messages == [
        "MLflow: this is not logged: a driver's message of two lines: postgresql://***@host/db",
        "MLflow: this is not logged: it does not answer",
    ]


def test_pictures_are_logged_below_previews(project: Path) -> None:
    store = Store(Tracking(), project)
    run = store.open("stage1", {})
    picture = project / "step-1.png"
    picture.write_bytes(b"png")
    assert store.previews_of(run) == set()
    store.log_preview(run, picture)
    assert store.previews_of(run) == {"step-1.png"}
    assert list((project / "tracking/artifacts").rglob("step-1.png"))


def test_models_have_the_stage_as_alias(project: Path) -> None:
    store = Store(Tracking(), project)
    run = store.open("stage1", {})
    weights = project / "runs/stage1/ema.safetensors"
    assert store.register("magicdrive-demo", "stage1", weights, "cd" * 32, run) == "1"
    assert store.register("magicdrive-demo", "stage1", weights, "ab" * 32, run) == "2"
    assert store.register("magicdrive-demo", "stage1", weights, "ab" * 32, run) == "2"  # once for each run
    version = store.client.get_model_version_by_alias("magicdrive-demo", "stage1")
    assert version.version in (2, "2")
    assert version.run_id == run
    assert version.source.endswith("runs/stage1/ema.safetensors")
    assert version.tags == {"weights_sha256": "ab" * 32}


def test_two_processes_may_use_a_new_database_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from magicdrive_core.config.schema import Tracking;"
        "from magicdrive_core.tracking.runs import Store; print(Store(Tracking(), Path(sys.argv[1])).open('a', {}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert [errors for _, errors in answers] == ["", ""]  # MLflow's own chatter stays off the terminal
    store = Store(Tracking(), tmp_path)
    known = {run.info.run_id for run in store.client.search_runs([store.experiment])}
    assert known == {run.strip() for run, _ in answers}


def test_a_broken_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking/mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(MagicDriveError, match=r"MLflow cannot use sqlite:///tracking/mlflow\.db"):
        Store(Tracking(), tmp_path)


def test_a_second_report_updates_the_run_of_the_submission(project: Path) -> None:
    config, folder = load_config(PROFILE), project / "outputs/submission-0"
    folder.mkdir(parents=True)
    page = folder / "report.html"
    page.write_text("first")
    run = log_submission(config, folder, {"small_224": 0.5}, [page, folder / "none.json"], {"model": "a"}, project)
    page.write_text("second")
    assert log_submission(config, folder, {"small_224": 0.25}, [page], {"model": "b"}, project) == run
    store = Store(config.tracking, project)
    found = store.client.get_run(run)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"small_224": 0.25})
    assert found.data.params["submission.team"] == "demo"
    assert found.data.tags["model"] == "b"
    assert [file.path for file in store.client.list_artifacts(run)] == ["report.html"]
    copy = store.client.download_artifacts(run, "report.html", str(project))
    assert Path(copy).read_text() == "second"


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([3.0], (3.0, 3.0)),
        ([3.0, 1.0], (3.0, 1.0)),
        ([4.0, 2.0, 1.0, 1.0], (3.0, 1.0)),  # half of all
        ([2.0] * 8 + [5.0] * 60 + [1.0] * 8, (2.0, 1.0)),  # eight
        ([2.0] * 20 + [5.0] * 160 + [1.0] * 20, (2.0, 1.0)),  # a tenth
    ],
)
def test_first_and_last_losses_of_short_and_long_runs(losses: list[float], ends: tuple[float, float]) -> None:
    assert first_and_last(losses) == pytest.approx(ends)


leaf = st.integers() | st.booleans() | st.text(max_size=5)
keys = st.sampled_from("abc")


@given(st.dictionaries(keys, leaf | st.dictionaries(keys, leaf)))
def test_flat_params_are_texts_and_lose_nothing(values: dict[str, object]) -> None:
    def leaves(value: object) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    flat = flatten(values)
    assert all(isinstance(value, str) for value in flat.values())
    assert len(flat) == leaves(values)


def test_a_deleted_experiment_is_named(project: Path, config: Config) -> None:
    tracking = config.tracking.model_copy(update={"experiment": "gone"})
    store = Store(tracking, project)
    store.client.delete_experiment(store.experiment)
    with pytest.raises(MagicDriveError, match="the MLflow experiment 'gone' is deleted"):
        Store(tracking, project)


def test_params_hide_secrets_and_errors_hide_passwords(tmp_path: Path) -> None:
    config = load_config(PROFILE, ["cluster.environment={HF_TOKEN: swordfish}", "tracking.uri=foo://me:swordfish@db/x"])
    flat = flatten(config.model_dump(mode="json"))
    assert flat["cluster.environment.HF_TOKEN"] == "***"
    assert flat["tracking.uri"] == "foo://***@db/x"
    with pytest.raises(MagicDriveError, match=r"foo://\*\*\*@db/x") as raised:
        Store(config.tracking, tmp_path)
    assert "swordfish" not in str(raised.value)
