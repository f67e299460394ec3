"""Jobs in a queue: submitted, watched, found again and cancelled, with a scripted queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from magicdrive_core.config.schema import Cluster
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.launch.queue import query, run_command, run_queued
from magicdrive_core.utils.files import read_json, write_json


class Scripted:
    """A queue that gives the answers to ``ended`` in turn; when one is True, the hosts have written their status."""

    file = "script.sh"

    def __init__(self, job: Job, *ended: bool, hosts: Callable[[Job], None] = lambda _: None) -> None:
        self.job, self.answers, self.hosts = job, list(ended), hosts
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def render(self, job: Job) -> str:
        return f"run {job.name}\n"

    def submit(self, job: Job, path: Path) -> str:
        self.submitted.append(path.read_text())
        return "17"

    def ended(self, name: str) -> bool:
        assert name == "17"
        end = self.answers.pop(0)
        if end:
            self.hosts(self.job)
        return end

    def cancel(self, name: str) -> None:
        assert self.job.stop_note.exists(), "nobody may start it again"
        self.cancelled.append(name)


def exits(*codes: int) -> Callable[[Job], None]:
    """Write the exit statuses of the hosts, the later hosts first."""

    def leave(job: Job) -> None:
        for host, code in enumerate(codes):
            error = {"message": f"rank of host {host} failed", "hint": "fix it"} if code == 1 else {}
            write_json(job.exit_file(host), {"code": code, "message": "", "hint": "", "ended": -host} | error)

    return leave


@pytest.fixture
def job(tmp_path: Path) -> Job:
    cluster = Cluster.model_validate({"launcher": "slurm", "slurm": {}, "hosts": 2, "ranks": 4, "grace_seconds": 1})
    paths = {"folder": tmp_path / "launch", "log": tmp_path / "log.txt", "status": tmp_path / "status.json"}
    return Job.of(cluster, "one", ["-m", "module"], environment={"A": "b"}, **paths)


@pytest.mark.parametrize(("codes", "result"), [((0, 0), 0), ((RESUMABLE, RESUMABLE), RESUMABLE), ((0, 75), 75)])
def test_the_exit_statuses_of_the_hosts_decide(job: Job, codes: tuple[int, ...], result: int) -> None:
    queue = Scripted(job, False, True, hosts=exits(*codes))
    polls: list[int] = []
    assert run_queued(queue, job, lambda: polls.append(1), query_seconds=0.01) == result
    assert queue.submitted == ["run one\n"]
    assert polls
    assert Job.read(job.folder) == job


def test_the_host_that_failed_first_is_reported(job: Job) -> None:
    with pytest.raises(MagicDriveError, match="rank of host 1 failed") as caught:
        run_queued(Scripted(job, True, hosts=exits(1, 1)), job, query_seconds=0.01)
    assert caught.value.hint == "fix it"


def test_a_host_without_an_exit_status_is_reported(job: Job) -> None:
    with pytest.raises(MagicDriveError, match="host 1 of 2 wrote no exit status"):
        run_queued(Scripted(job, True, hosts=exits(75)), job, query_seconds=0.01)


def test_exit_statuses_of_an_earlier_start_do_not_count(job: Job) -> None:
    exits(0, 0)(job)
    job.stop_note.touch()
    with pytest.raises(MagicDriveError, match="host 0, 1 of 2 wrote no exit status"):
        run_queued(Scripted(job, True), job, query_seconds=0.01)
    assert not job.stop_note.exists()


def test_an_interrupted_watch_cancels_and_waits(job: Job) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    queue = Scripted(job, False, True)
    with pytest.raises(KeyboardInterrupt):
        run_queued(queue, job, interrupt, query_seconds=0.01)
    assert queue.cancelled == ["17"]
    assert not queue.answers


def test_a_job_that_outlived_its_watcher_is_watched_again(job: Job) -> None:
    write_json(job.folder / "queued.json", {"name": "17"})
    queue = Scripted(job, False, False, True, hosts=exits(0, 0))
    assert run_queued(queue, job, query_seconds=0.01) == 0
    assert not queue.submitted
    assert not (job.folder / "queued.json").exists()


def test_a_job_that_ended_unwatched_is_submitted_again(job: Job) -> None:
    write_json(job.folder / "queued.json", {"name": "17"})
    queue = Scripted(job, True, True, hosts=exits(0, 0))
    assert run_queued(queue, job, query_seconds=0.01) == 0
    assert queue.submitted
    assert read_json(job.folder / "job.json")["environment"] == {"A": "b"}


def test_a_missing_scheduler_and_one_that_refuses() -> None:
    with pytest.raises(MagicDriveError, match="no-such-scheduler is not installed on this host"):
        query(["no-such-scheduler"])
    with pytest.raises(MagicDriveError, match="bash refused: no such partition"):
        run_command(["bash", "-c", "echo no such partition >&2; exit 1"])
