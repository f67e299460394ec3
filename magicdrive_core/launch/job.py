"""A job: a process group to be launched, and the exit status of each of its hosts.

All hosts share the project's folder: a job and the exit statuses of its hosts are files below ``Job.folder``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Cluster
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.launch.process_group import RESUMABLE, RESUME_HINT
from magicdrive_core.utils.files import read_json, write_json


@dataclass(frozen=True)
class Job:
    """What every rank runs. Paths are relative to the project's folder, in which all ranks run.

    Attributes:
        name: in a queue: lower-case letters, digits and dashes.
        command: a script and its arguments, or ``-m module arguments``.
        folder: where this launch's files are.
        log: output of host 0's ranks; the logs of other hosts are beside it.
        status: touched by the ranks while they make progress.
        hosts: number of hosts.
        ranks: on each host.
        environment: variables of the ranks.
        threads: CPU threads of a rank; 0 shares the host's cores evenly.
        stall_seconds: the ranks are stopped when ``status`` has not changed for this long.
        grace_seconds: between SIGTERM and SIGKILL.
    """

    name: str
    command: list[str]
    folder: Path
    log: Path
    status: Path
    hosts: int
    ranks: int
    environment: dict[str, str]
    threads: int
    stall_seconds: float
    grace_seconds: float

    @classmethod
    def of(
        cls,
        cluster: Cluster,
        name: str,
        command: list[str],
        *,
        folder: Path,
        log: Path,
        status: Path,
        environment: dict[str, str],
        shape: tuple[int, int] | None = None,
    ) -> Job:
        """Make a job with the cluster's settings.

        Args:
            cluster: hosts, ranks, threads, times.
            name: in a queue: lower-case letters, digits and dashes.
            command: what every rank runs: a script and its arguments, or ``-m module arguments``.
            folder: where this launch's files are.
            log: output of host 0's ranks.
            status: touched by the ranks while they make progress.
            environment: variables of the ranks; the cluster's come on top.
            shape: number of hosts and ranks of each, in place of the cluster's; None: the cluster's.

        Returns:
            The job; nothing is written or started.
        """
        hosts, ranks = shape or (cluster.hosts, cluster.ranks)
        return cls(
            name,
            command,
            folder,
            log,
            status,
            hosts,
            ranks,
            environment | cluster.environment,
            cluster.threads,
            cluster.stall_seconds,
            cluster.grace_seconds,
        )

    @property
    def stop_note(self) -> Path:
        """A file that exists once the job was cancelled: the ranks save, and nobody starts them again."""
        return self.folder / "stop"

    def log_of(self, host: int) -> Path:
        """Return the log of a host's ranks.

        Args:
            host: number of the host, from 0.

        Returns:
            ``log`` for host 0; for the others a file beside it whose name has the host's number.
        """
        return self.log if host == 0 else self.log.with_name(f"{self.log.stem}-host{host}{self.log.suffix}")

    def exit_file(self, host: int) -> Path:
        """Return the file that a host writes when its ranks have ended.

        Args:
            host: number of the host, from 0.

        Returns:
            A file in ``folder``: JSON with the exit status, an error and its hint, and the time.
        """
        return self.folder / f"host-{host}.json"

    def write(self) -> None:
        """Write the job for the hosts; exit files and the stop note of an earlier start are removed.

        Only the owner can read the file, because variables may hold secrets.
        """
        for path in [self.stop_note, *(self.exit_file(host) for host in range(self.hosts))]:
            path.unlink(missing_ok=True)
        write_json(self.folder / "job.json", asdict(self) | _texts(self), private=True)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read the job that ``write`` wrote.

        Args:
            folder: the job's folder.

        Raises:
            MagicDriveError: the folder holds no job.
        """
        values = read_json(folder / "job.json", "magicdrive train writes it")
        return cls(**values | {name: Path(values[name]) for name in ("folder", "log", "status")})

    def outcome(self) -> int:
        """Read the exit status of all hosts.

        Returns:
            0, or 75 (``RESUMABLE``) when the ranks saved a checkpoint and want to be started again.

        Raises:
            MagicDriveError: a host failed (the message is that of the first), or a host wrote no exit status.
        """
        files = {host: self.exit_file(host) for host in range(self.hosts)}
        statuses = {host: read_json(file) for host, file in files.items() if file.is_file()}
        failures = [status for status in statuses.values() if status["code"] not in (0, RESUMABLE)]
        if failures:
            first = min(failures, key=lambda status: status["ended"])
            raise MagicDriveError(first["message"], first["hint"])
        silent = [str(host) for host in range(self.hosts) if host not in statuses]
        if silent:
            raise MagicDriveError(
                f"{self.name} has left the queue, but host {', '.join(silent)} of {self.hosts} wrote no exit status;"
                f" logs: {self.folder}, {self.log}",
                "the host was lost, hit a limit of time or memory, or the job was cancelled in the queue; "
                + RESUME_HINT,
            )
        return int(max(status["code"] for status in statuses.values()))


def _texts(job: Job) -> dict[str, Any]:
    return {name: str(getattr(job, name)) for name in ("folder", "log", "status")}
