"""Slurm: a batch script that starts one launcher on each host, and requeues itself on exit status 75."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from magicdrive_core.config.schema import Slurm
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.queue import query, run_command

# Final states of a job.
ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)


class SlurmQueue:
    """The Slurm cluster that ``sbatch`` reaches.

    Args:
        settings: partition, account, time, devices, more options.
    """

    file = "slurm.sh"

    def __init__(self, settings: Slurm) -> None:
        self._settings = settings

    def render(self, job: Job) -> str:
        """Return the batch script of a job, which runs in the present working directory with this Python.

        Args:
            job: hosts, ranks, environment and grace.

        Returns:
            The script, from the template ``slurm.sh.j2``.
        """
        templates = Environment(
            loader=PackageLoader("magicdrive_core.launch", "."),
            undefined=StrictUndefined,
            trim_blocks=True,
            keep_trailing_newline=True,
        )
        templates.filters["quote"] = lambda value: shlex.quote(str(value))
        return templates.get_template("slurm.sh.j2").render(
            job=job, slurm=self._settings, project=Path.cwd(), python=sys.executable
        )

    def submit(self, job: Job, path: Path) -> str:  # noqa: ARG002
        """Submit the batch script of a job.

        Args:
            job: not used; the script has all of it.
            path: the rendered script.

        Returns:
            Slurm's number of the job.

        Raises:
            MagicDriveError: sbatch is not installed, or Slurm refused, with its reason.
        """
        number = run_command(["sbatch", "--parsable", str(path)])  # "number;cluster" in a federation
        return number.strip().split(";")[0]

    def ended(self, name: str) -> bool:
        """Return whether a job is in a final state; a requeued job is not.

        Args:
            name: Slurm's number of the job.

        Returns:
            True, too, where Slurm no longer knows the job; False where its controller does not answer.

        Raises:
            MagicDriveError: squeue is not installed.
        """
        result = query(["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", name])
        if result.returncode:
            return "Invalid job id" in result.stderr  # forgotten; otherwise the controller does not answer
        return result.stdout.strip() in ENDED | {""}

    def cancel(self, name: str) -> None:
        """Remove a waiting job; request the ranks of a running one to stop, and its script ends with them.

        Args:
            name: Slurm's number of the job.

        Raises:
            MagicDriveError: scancel is not installed, or Slurm refused, with its reason.
        """
        run_command(["scancel", "--quiet", "--state=PENDING", name])
        query(["scancel", "--quiet", "--signal=TERM", name])
