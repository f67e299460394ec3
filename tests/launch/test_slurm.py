"""Jobs of two hosts on a real Slurm: requeued on exit status 75, cancelled for good, failures reported."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from magicdrive_core.config.schema import Cluster, Slurm
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.launch.queue import run_queued
from magicdrive_core.launch.slurm import SlurmQueue
from tests.launch.slurm_cluster import slurm_cluster

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]

# A rank that meets its peer, and then does what the test wants.
RANK = """
import os, pathlib, signal, sys, time
folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def save(*_):
    (folder / f"saved-{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
starts = folder / f"starts-{rank}"
count = int(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text(str(count))
print(f"rank {rank} of {world} on {os.environ['SLURMD_NODENAME']}, with {os.environ['GREETING']}", flush=True)
while not all((folder / f"starts-{r}").exists() for r in range(world)):
    time.sleep(0.05)
if mode == "saves once" and count == 1:
    sys.exit(75)
if mode == "fails":
    time.sleep(1 if rank == 1 else 5)
    raise ValueError("the disk is on fire" if rank == 1 else "rank 1 is gone")
if mode == "waits":
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as conf:
        os.environ["SLURM_CONF"] = str(conf)
        yield
        del os.environ["SLURM_CONF"]


@pytest.fixture
def queue(slurm: None) -> SlurmQueue:
    cluster = Cluster.model_validate({"launcher": "slurm", "ranks": 1, "slurm": {"devices": None, "time": "00:10:00"}})
    assert cluster.slurm is not None
    return SlurmQueue(cluster.slurm)


def job(folder: Path, mode: str, hosts: int = 2) -> Job:
    script = folder / "rank.py"
    script.write_text(RANK)
    cluster = Cluster.model_validate(
        {
            "launcher": "slurm",
            "hosts": hosts,
            "ranks": 1,
            "slurm": {},
            "grace_seconds": 20,
            "environment": {"PYTHONPATH": str(PROJECT), "GREETING": "it's so", "OMP_NUM_THREADS": "1"},
        }
    )
    return Job.of(
        cluster,
        "magicdrive-test",
        [str(script), str(folder), mode],
        folder=folder / "launch",
        log=folder / "log.txt",
        status=folder / "status.json",
        environment={},
    )


def test_ranks_that_saved_are_started_again_by_the_queue(queue: SlurmQueue, tmp_path: Path) -> None:
    this = job(tmp_path, "saves once")
    hurried = False

    def hurry() -> None:
        """Shorten the wait of a requeued job: Slurm's is two minutes, and within a second its hosts refuse it."""
        nonlocal hurried
        if not hurried and (tmp_path / "starts-1").exists() and (this.folder / "queued.json").exists():
            name = json.loads((this.folder / "queued.json").read_text())["name"]
            command = ["scontrol", "update", f"jobid={name}", "starttime=now+3seconds"]
            hurried = subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert run_queued(queue, this, hurry, query_seconds=0.5) == 0
    assert [(tmp_path / f"starts-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert "rank 0 of 2 on host0, with it's so" in (tmp_path / "log.txt").read_text()
    assert "rank 1 of 2 on host1, with it's so" in (tmp_path / "log-host1.txt").read_text()
    assert not (tmp_path / "launch/queued.json").exists()


def test_a_failing_rank_of_any_host_is_named(queue: SlurmQueue, tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"rank 1 failed: ValueError: the disk is on fire; log: .*log-host1\.txt"):
        run_queued(queue, job(tmp_path, "fails"), query_seconds=0.5)


def test_a_cancelled_job_saves_on_all_hosts_and_stays_cancelled(queue: SlurmQueue, tmp_path: Path) -> None:
    this = job(tmp_path, "waits")

    def cancel() -> None:
        if all((tmp_path / f"starts-{rank}").exists() for rank in range(2)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_queued(queue, this, cancel, query_seconds=0.5)
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))
    name = json.loads((tmp_path / "launch/queued.json").read_text())["name"]
    assert queue.ended(name)
    assert this.outcome() == RESUMABLE


def test_a_refusal_of_the_queue_is_reported(slurm: None, tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"sbatch refused: .*[Ii]nvalid partition"):
        run_queued(SlurmQueue(Slurm(partition="none", devices=None)), job(tmp_path, "waits"))
