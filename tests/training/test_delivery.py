"""Delivery to MLflow: what the server has in the end, whatever was away or ended in between."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Tracking
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.tracking.lineage import read_run_note
from magicdrive_core.tracking.runs import Entry, Status, Store
from magicdrive_core.training import delivery as delivering
from magicdrive_core.training.delivery import Delivery, deliver_late
from magicdrive_core.utils.files import write_json

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
STEPS = 60


@pytest.fixture
def config() -> Config:
    return load_config(PROFILE, ["training.log_every=5", f"training.stage1.steps={STEPS}"])


@pytest.fixture
def plan(project: Path) -> StagePlan:
    (project / "runs/stage1").mkdir(parents=True)
    return StagePlan("stage1", project / "runs/stage1", "f" * 64, {}, None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivering, "PERIOD_SECONDS", 0.02)
    monkeypatch.setattr(delivering, "RETRY_SECONDS", 0.02)


def write_steps(plan: StagePlan, first: int, last: int, *, new: bool = False) -> None:
    with (plan.folder / "metrics.jsonl").open("w" if new else "a") as file:
        for step in range(first, last + 1):
            print(json.dumps({"step": step, "loss": 1 / step, "seconds": 0.5, "time": 1e9 + step}), file=file)


def finish(plan: StagePlan) -> None:
    plan.weights.write_bytes(b"weights")
    write_json(plan.result, {"weights_sha256": "ab" * 32})


def history(project: Path, plan: StagePlan) -> list[int]:
    run = read_run_note(plan.folder)["run"]
    return [metric.step for metric in Store(Tracking(), project).client.get_metric_history(run, "loss")]


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_twelve_kills_leave_no_hole_and_no_double(project: Path, config: Config, plan: StagePlan) -> None:
    """After each kill the training resumes from a checkpoint some steps before, and makes these steps again."""
    done = 0
    for kill in range(12):
        first = done + 1 if kill % 3 else max(1, done - 3)
        write_steps(plan, 1, first - 1, new=True)
        delivery = Delivery(config, plan, None, project)
        delivery.start()
        done = min(STEPS, first + 6)
        write_steps(plan, first, done)
        if kill % 2:
            delivery.end("KILLED", 30)
        else:  # the launcher dies too: nothing is ended
            wait_until(lambda delivery=delivery: delivery._store)
            delivery._abandoned.set()
            delivery._thread.join()
    delivery = Delivery(config, plan, None, project)
    delivery.start()
    write_steps(plan, done + 1, STEPS)
    finish(plan)
    delivery.end("FINISHED", 60)
    assert history(project, plan) == list(range(5, STEPS + 1, 5))
    assert Store(Tracking(), project).client.get_run(delivery.run).info.status == "FINISHED"


class ServerThatMayBeAway(Store):
    """The real database behind a server that refuses every call while it is away."""

    away = False

    def __init__(self, *arguments: Any) -> None:
        self.check()
        super().__init__(*arguments)

    def check(self) -> None:
        if self.away:
            raise MlflowException("connection refused")

    def log_entries(self, run: str, entries: Sequence[Entry]) -> None:
        self.check()
        super().log_entries(run, entries)

    def log_preview(self, run: str, picture: Path) -> None:
        self.check()
        super().log_preview(run, picture)

    def close(self, run: str, status: Status, **tags: str) -> None:
        self.check()
        super().close(run, status, **tags)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[ServerThatMayBeAway]:
    monkeypatch.setattr(delivering, "Store", ServerThatMayBeAway)
    monkeypatch.setattr(ServerThatMayBeAway, "away", False)
    return ServerThatMayBeAway


def test_a_stage_that_ends_while_mlflow_is_away_is_registered_later(
    project: Path,
    config: Config,
    plan: StagePlan,
    server: type[ServerThatMayBeAway],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.away = True
    (plan.folder / "previews").mkdir()
    (plan.folder / "previews/step-00000010.png").write_bytes(b"png")
    delivery = Delivery(config, plan, None, project)
    delivery.start()
    write_steps(plan, 1, STEPS)
    finish(plan)
    wait_until(lambda: "MLflow gets metrics later: connection refused; training continues" in caplog.text)
    delivery.end("FINISHED", 0.05)
    assert "has not got all of stage1: connection refused" in caplog.text
    assert "run the same command again to send it" in caplog.text
    assert delivery.run is None
    delivery._thread.join()

    server.away = False
    deliver_late(config, plan, None, project)
    note = read_run_note(plan.folder)
    store = Store(Tracking(), project)
    assert history(project, plan) == list(range(5, STEPS + 1, 5))
    assert store.previews_of(note["run"]) == {"step-00000010.png"}
    assert store.client.get_run(note["run"]).info.status == "FINISHED"
    assert store.client.get_model_version_by_alias("magicdrive-demo", "stage1").run_id == note["run"]
    deliver_late(config, plan, None, project)  # it has all: nothing is sent or asked
    assert read_run_note(plan.folder) == note
    assert len(store.client.search_model_versions("name = 'magicdrive-demo'")) == 1


def test_a_server_that_comes_back_during_a_training_gets_all(
    project: Path,
    config: Config,
    plan: StagePlan,
    server: type[ServerThatMayBeAway],
    caplog: pytest.LogCaptureFixture,
) -> None:
    delivery = Delivery(config, plan, None, project)
    delivery.start()
    write_steps(plan, 1, 20)
    wait_until(lambda: 20 in delivery._known)
    server.away = True
    write_steps(plan, 21, 40)
    wait_until(lambda: "MLflow gets metrics later" in caplog.text)
    server.away = False
    write_steps(plan, 41, STEPS)
    finish(plan)
    delivery.end("FINISHED", 60)
    assert history(project, plan) == list(range(5, STEPS + 1, 5))
    assert caplog.text.count("MLflow gets metrics later") == 1


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hanging_server_is_not_waited_for(
    hanging_server: str, config: Config, plan: StagePlan, project: Path
) -> None:
    tracking = config.tracking.model_copy(update={"uri": hanging_server})
    config = config.model_copy(update={"tracking": tracking})
    started = time.monotonic()
    delivery = Delivery(config, plan, None, plan.folder)
    delivery.start()
    write_steps(plan, 1, 10)
    delivery.end("KILLED", 0.1)
    assert time.monotonic() - started < 5
    assert delivery._thread.is_alive()  # in its call, and a daemon: it does not hold up the exit of the process
    assert delivery._thread.daemon


def test_a_process_whose_server_hangs_ends_at_once_on_sigterm(hanging_server: str, project: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from typing import Any
from magicdrive_core.config.load import load_config
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.launch.process_group import terminable
from magicdrive_core.training.delivery import Delivery
config = load_config(sys.argv[1], [f"tracking.uri={sys.argv[2]}"])
folder = Path("runs/stage1")
folder.mkdir(parents=True)
delivery = Delivery(config, StagePlan("stage1", folder, "f" * 64, {}, None), None)
with terminable():
    delivery.start()
    print("delivering", flush=True)
    time.sleep(300)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(PROFILE), hanging_server], cwd=project, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "delivering\n"
    time.sleep(0.5)
    child.terminate()
    assert child.wait(20) == 143


def test_entries_are_sent_in_whole_and_in_calls_that_mlflow_takes() -> None:
    entries = [Entry(step, 0.0, dict.fromkeys(map(str, range(300)), 1.0)) for step in range(8)]
    batches = list(delivering._batches(entries))
    assert [entry.step for batch in batches for entry in batch] == list(range(8))
    assert [len(batch) for batch in batches] == [3, 3, 2]
