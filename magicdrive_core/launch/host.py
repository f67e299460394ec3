"""One host's ranks of a job: ``python -m magicdrive_core.launch.host FOLDER``, started by Slurm or Kubernetes.

The scheduler sets the number of the host in the environment; ``MASTER_ADDR`` and ``MASTER_PORT`` say where host 0 is.
SIGTERM and SIGUSR2, which a scheduler sends before a time limit or a pre-emption, request the ranks to stop. Exit
status: 0, 75 (checkpoint saved, may be started again), 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from magicdrive_core.errors import MagicDriveError, report_error
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.process_group import HostPlacement, run_group
from magicdrive_core.utils.files import write_json

HOST_NUMBERS = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")  # variables of Slurm and Kubernetes


def run_host(job: Job, placement: HostPlacement, stop: Callable[[], bool]) -> int:
    """Run this host's ranks to their end, and write their exit status into the job's folder.

    Args:
        job: what to run.
        placement: this host among the hosts of the job.
        stop: called twice a second; once it returns True, the ranks are requested to stop.

    Returns:
        The exit status: 0, 75 (``RESUMABLE``), or that of the error, which is printed and not raised.
    """
    job.exit_file(placement.host).unlink(missing_ok=True)
    error = MagicDriveError("")
    try:
        code = run_group(
            job.command,
            job.ranks,
            log=job.log_of(placement.host),
            status=job.status,
            stall_seconds=job.stall_seconds,
            threads=job.threads,
            environment=job.environment,
            stop=lambda: stop() or job.stop_note.exists(),
            grace_seconds=job.grace_seconds,
            placement=placement,
        )
    except MagicDriveError as failure:
        error, code = failure, failure.exit_code
        report_error(error, "")
    status = {"code": code, "message": error.message, "hint": error.hint, "ended": time.time()}
    write_json(job.exit_file(placement.host), status)
    return code


def main() -> None:
    """Read the job and this host's placement, and exit with the ranks' status."""
    requested = False

    def note(_signum: int, _frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, note)
    job = Job.read(Path(sys.argv[1]))
    host = next(int(os.environ[name]) for name in HOST_NUMBERS if name in os.environ)
    placement = HostPlacement(host, job.hosts, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    sys.exit(run_host(job, placement, lambda: requested))


if __name__ == "__main__":
    main()
