"""MLflow's database is on a full disk, locked and back again: the history that a training delivers has no hole."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Tracking
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.tracking.lineage import read_run_note
from magicdrive_core.tracking.runs import Store
from magicdrive_core.training import delivery as delivering
from magicdrive_core.training.delivery import Delivery, deliver_late
from magicdrive_core.utils.files import write_json
from tests.conftest import PROJECT
from tests.drills.conftest import Drill, fill
from tests.tracking.conftest import migrated

__all__ = ["migrated"]

LOG_EVERY = 5


@contextmanager
def full(disk: Path) -> Iterator[None]:
    ballast = fill(disk)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def locked(disk: Path) -> Iterator[None]:
    """Another process holds the database: every write hangs until the database gives up waiting."""
    with sqlite3.connect(disk / "tracking/mlflow.db", timeout=60, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")
    other.close()


OUTAGES = [full, locked]


def write_steps(plan: StagePlan, first: int, last: int) -> float:
    """Write lines as a training does; returns how long that took."""
    began = time.monotonic()
    with (plan.folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            print(json.dumps({"step": step, "loss": 1 / step, "seconds": 0.5, "time": 1e9 + step}), file=file)
    return time.monotonic() - began


def deliver_through(drill: Drill, disk: Path, runs: Path, outages: int, seed: int) -> None:
    """Train and deliver while the database is away again and again; the run's own folder is on another disk."""
    rng = random.Random(seed)
    steps = 10 * (outages + 1)
    config = load_config(
        PROJECT / "profiles/demo.yaml", [f"training.log_every={LOG_EVERY}", f"training.stage1.steps={steps}"]
    )
    runs.mkdir(parents=True)
    plan = StagePlan("stage1", runs, "f" * 64, {}, None)
    delivery, done = Delivery(config, plan, None, disk), 0
    delivery.start()
    for number in range(outages):
        with OUTAGES[number % len(OUTAGES)](disk):
            write_steps(plan, done + 1, done + 7)
            time.sleep(rng.uniform(0, 0.3))
        write_steps(plan, done + 8, done + 10)
        done += 10
        drill.faults += 1
        if rng.random() < 0.3:  # the launcher is killed: nothing is ended
            delivery._abandoned.set()
            delivery = Delivery(config, plan, None, disk)
            delivery.start()
            drill.faults += 1
    write_steps(plan, done + 1, steps)
    plan.weights.write_bytes(b"weights")
    write_json(plan.result, {"weights_sha256": "ab" * 32})
    delivery.end("FINISHED", 60)
    deliver_late(config, plan, None, disk)
    client, run = Store(Tracking(), disk).client, read_run_note(plan.folder)["run"]
    history = [metric.step for metric in client.get_metric_history(run, "loss")]
    expected = list(range(LOG_EVERY, steps + 1, LOG_EVERY))
    drill.lost += len(set(expected) - set(history))
    drill.compared += len(expected)
    assert history == expected
    drill.compare(client.get_run(run).info.status, "FINISHED")


@pytest.fixture
def database(small_disk: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(delivering, "PERIOD_SECONDS", 0.02)
    monkeypatch.setattr(delivering, "RETRY_SECONDS", 0.02)
    (small_disk / "tracking").mkdir()
    shutil.copy(migrated, small_disk / "tracking/mlflow.db")
    return small_disk


def test_a_database_that_is_away_and_back_holds_every_step(drill: Drill, database: Path, tmp_path: Path) -> None:
    deliver_through(drill, database, tmp_path / "run", 3, seed=3)


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_sixty_outages_of_the_database(drill: Drill, database: Path, tmp_path: Path) -> None:
    """Tracking: the database on a full disk or locked, its launcher killed, again and again."""
    deliver_through(drill, database, tmp_path / "run", drill.scaled(60), seed=4)
