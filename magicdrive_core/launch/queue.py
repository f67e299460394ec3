"""A job in a scheduler's queue, from its submission to its end: watched, cancelled in order, found again.

The job outlives the process that submitted it: a flow that was killed and is started again watches the same job.
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

QUERY_SECONDS = 5.0  # between queries of the queue


class Queue(Protocol):
    """A scheduler."""

    file: str  # name of the rendered script or manifest

    def render(self, job: Job) -> str:
        """Return the script or manifest of a job.

        Args:
            job: what to run.

        Returns:
            The text of the file that ``submit`` gets.
        """
        ...

    def submit(self, job: Job, path: Path) -> str:
        """Submit a job.

        Args:
            job: what to run.
            path: the rendered script or manifest.

        Returns:
            The job's name in the queue.

        Raises:
            MagicDriveError: the scheduler refused, with its reason.
        """
        ...

    def ended(self, name: str) -> bool:
        """Return whether a job neither runs nor waits.

        Args:
            name: the job's name in the queue.

        Returns:
            False, too, where the scheduler does not answer.
        """
        ...

    def cancel(self, name: str) -> None:
        """Remove a job from the queue; the ranks of a running one are requested to stop.

        Args:
            name: the job's name in the queue.

        Raises:
            MagicDriveError: the scheduler refused, with its reason.
        """
        ...


def run_queued(
    queue: Queue, job: Job, on_poll: Callable[[], None] | None = None, *, query_seconds: float = QUERY_SECONDS
) -> int:
    """Submit a job, or find the one that was submitted before, and wait for its end.

    Args:
        queue: the scheduler.
        job: what to run.
        on_poll: called twice a second, e.g. to move a progress bar; None: nothing.
        query_seconds: between queries of the queue.

    Returns:
        0, or 75 (``RESUMABLE``) when the ranks saved a checkpoint and the queue has not started them again itself.

    Raises:
        MagicDriveError: the scheduler refused the job, or the job failed.
        BaseException: whatever interrupted the waiting, raised again after the job was cancelled.
    """
    note = job.folder / "queued.json"
    name = read_json(note)["name"] if note.is_file() else None
    if name is not None and not queue.ended(name):
        logger.info("%s is already in the queue as %s; waiting for it", job.name, name)
    else:
        job.write()
        with atomic_file(job.folder / queue.file, private=True) as partial:  # it holds the ranks' variables
            partial.write_text(queue.render(job))
        name = queue.submit(job, job.folder / queue.file)
        write_json(note, {"name": name})
        logger.info("%s is in the queue as %s: %s", job.name, name, job.folder / queue.file)
    with terminable():
        try:
            _wait(queue, name, on_poll, query_seconds)
        except BaseException:
            job.stop_note.touch()
            try:
                queue.cancel(name)
            except MagicDriveError as error:  # the interruption is what is raised
                logger.warning("%s may still be in the queue as %s: %s", job.name, name, error)
            _wait(queue, name, None, min(1.0, query_seconds), limit=job.grace_seconds)
            raise
    note.unlink()
    return job.outcome()


def _wait(
    queue: Queue, name: str, on_poll: Callable[[], None] | None, query_seconds: float, limit: float = float("inf")
) -> None:
    started = queried = time.monotonic()
    while time.monotonic() - started < limit:
        if on_poll is not None:
            on_poll()
        time.sleep(min(POLL_SECONDS, query_seconds))
        if time.monotonic() - queried >= query_seconds:
            if queue.ended(name):
                return
            queried = time.monotonic()


def query(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a scheduler's command that may fail.

    Args:
        command: program and arguments.

    Returns:
        Exit status, output and errors as text.

    Raises:
        MagicDriveError: the command is not installed.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MagicDriveError(
            f"{command[0]} is not installed on this host", "run on a host of the cluster, or set cluster.launcher=local"
        ) from None


def run_command(command: Sequence[str]) -> str:
    """Run a scheduler's command that must succeed.

    Args:
        command: program and arguments.

    Returns:
        Its output.

    Raises:
        MagicDriveError: the command is not installed, or the scheduler refused, with its reason.
    """
    result = query(command)
    if result.returncode:
        reason = (result.stderr.strip() or result.stdout.strip() or "no reason given").splitlines()[-1]
        raise MagicDriveError(f"{command[0]} refused: {reason}", "check the cluster section of params.yaml")
    return result.stdout
