"""Slurm: a batch script that starts one launcher on each host, and has the queue start it again on exit status 75."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from magicdrive_core.config.schema import Slurm
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.queue import ask, tell

# States after which Slurm does nothing more with a job.
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
    """The queue that ``sbatch`` reaches."""

    file = "slurm.sh"

    def __init__(self, settings: Slurm) -> None:
        self._settings = settings

    def render(self, job: Job) -> str:
        """The batch script."""
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
        """Returns Slurm's number of the job."""
        return tell(["sbatch", "--parsable", str(path)]).strip().split(";")[0]  # "number;cluster" in a federation

    def ended(self, name: str) -> bool:
        """A job that was started again has not."""
        answer = ask(["squeue", "--noheader", "--states=all", "--format=%T", "--jobs", name])
        if answer.returncode:
            return "Invalid job id" in answer.stderr  # forgotten; anything else is a controller that does not answer
        return answer.stdout.strip() in ENDED | {""}

    def cancel(self, name: str) -> None:
        """Waiting jobs go; the ranks of a running one are asked to save, and its script ends with them."""
        tell(["scancel", "--quiet", "--state=PENDING", name])
        ask(["scancel", "--quiet", "--signal=TERM", name])
