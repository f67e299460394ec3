"""One host's ranks of a job: ``python -m magicdrive_core.launch.host FOLDER``, started by Slurm or Kubernetes.

The scheduler tells the host its number; ``MASTER_ADDR`` and ``MASTER_PORT`` say where host 0 is. SIGTERM or SIGUSR2,
the time limit's and a pre-emption's alike, asks the ranks to save. Exit status: 0, 75 (saved, to be started again), 1.
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

NUMBERS = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")  # a host's number, as Slurm and Kubernetes call it


def run_host(job: Job, placement: HostPlacement, stop: Callable[[], bool]) -> int:
    """Runs this host's ranks to their end, leaves the answer in the job's folder, and returns the exit status."""
    job.answer(placement.host).unlink(missing_ok=True)
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
    answer = {"code": code, "message": error.message, "hint": error.hint, "ended": time.time()}
    write_json(job.answer(placement.host), answer)
    return code


def main() -> None:
    """Reads the job and the placement among the hosts, and exits with the ranks' status."""
    asked = False

    def note(_signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, note)
    job = Job.read(Path(sys.argv[1]))
    host = next(int(os.environ[name]) for name in NUMBERS if name in os.environ)
    placement = HostPlacement(host, job.hosts, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    sys.exit(run_host(job, placement, lambda: asked))


if __name__ == "__main__":
    main()
