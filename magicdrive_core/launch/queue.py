"""A job in a scheduler's queue, from its submission to its end: watched, cancelled in order, found again.

The queue outlives whoever submitted: a flow that was killed and is started again watches the job that is still there.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.process_group import POLL_SECONDS, terminable
from magicdrive_core.utils.files import atomic_file, read_json, write_json

logger = logging.getLogger(__name__)

ASK_SECONDS = 5.0  # between questions to the queue


class Queue(Protocol):
    """A scheduler."""

    file: str  # name of what is submitted

    def render(self, job: Job) -> str:
        """The script or manifest."""
        ...

    def submit(self, job: Job, path: Path) -> str:
        """Puts the rendered file into the queue; returns the job's name there."""
        ...

    def ended(self, name: str) -> bool:
        """Whether it runs no more and waits no more. A scheduler that does not answer has ended nothing."""
        ...

    def cancel(self, name: str) -> None:
        """Takes it out of the queue; where it runs, its ranks are asked to save."""
        ...


def run_queued(
    queue: Queue, job: Job, on_poll: Callable[[], None] | None = None, *, ask_seconds: float = ASK_SECONDS
) -> int:
    """Submits a job, or finds the one that was submitted before, and waits for its end.

    Args:
        queue: where to.
        job: what.
        on_poll: called twice a second.
        ask_seconds: between questions to the queue.

    Returns:
        0, or 75: the ranks saved and want to be started again (where the queue has not done that itself).

    Raises:
        MagicDriveError: the scheduler refused the job, or the job failed.
        BaseException: whatever interrupts the waiting is raised again after the job was cancelled.
    """
    note = job.folder / "queued.json"
    name = read_json(note)["name"] if note.is_file() else None
    if name is not None and not queue.ended(name):
        logger.info("%s is in the queue already, as %s: going on with it", job.name, name)
    else:
        job.write()
        with atomic_file(job.folder / queue.file) as partial:
            partial.write_text(queue.render(job))
        name = queue.submit(job, job.folder / queue.file)
        write_json(note, {"name": name})
        logger.info("%s is in the queue as %s: %s", job.name, name, job.folder / queue.file)
    with terminable():
        try:
            _wait(queue, name, on_poll, ask_seconds)
        except BaseException:
            job.stop_note.touch()
            try:
                queue.cancel(name)
            except MagicDriveError as error:  # the interruption is what is raised
                logger.warning("%s may go on in the queue as %s: %s", job.name, name, error)
            _wait(queue, name, None, min(1.0, ask_seconds), limit=job.grace_seconds)
            raise
    note.unlink()
    return job.outcome()


def _wait(
    queue: Queue, name: str, on_poll: Callable[[], None] | None, ask_seconds: float, limit: float = float("inf")
) -> None:
    began = asked = time.monotonic()
    while time.monotonic() - began < limit:
        if on_poll is not None:
            on_poll()
        time.sleep(min(POLL_SECONDS, ask_seconds))
        if time.monotonic() - asked >= ask_seconds:
            if queue.ended(name):
                return
            asked = time.monotonic()


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a scheduler's command and returns what it said.

    Raises:
        MagicDriveError: there is no such command here.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MagicDriveError(
            f"{command[0]} is not installed on this host", "start from a host of the cluster, or cluster.launcher=local"
        ) from None


def tell(command: Sequence[str]) -> str:
    """Runs a scheduler's command that has to succeed, and returns its output.

    Raises:
        MagicDriveError: it refused, with its own reason.
    """
    answer = ask(command)
    if answer.returncode:
        reason = (answer.stderr.strip() or answer.stdout.strip() or "it gave no reason").splitlines()[-1]
        raise MagicDriveError(f"{command[0]} refused: {reason}", "check the cluster section of params.yaml")
    return answer.stdout
