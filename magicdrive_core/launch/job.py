"""A process group to be launched, and what each of its hosts says of the end.

All hosts see one folder, the project's: what a host needs and what it answers are files below ``Job.folder``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Cluster
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.utils.files import read_json, write_json


@dataclass(frozen=True)
class Job:
    """What every rank runs. Paths are relative to the project's folder, in which all ranks run."""

    name: str  # in a queue: lower-case letters, digits and dashes
    command: list[str]  # for torchrun: a script and its arguments, or ``-m module arguments``
    folder: Path  # of this launch's files
    log: Path  # of host 0's ranks; the other hosts' lie beside it
    status: Path  # touched by the ranks as they go on
    hosts: int
    ranks: int  # of each host
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
        """A job as the cluster's settings have it; ``shape``: other hosts and ranks than theirs."""
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
        """There once the job was cancelled: the ranks are to save, and nobody starts them again."""
        return self.folder / "stop"

    def log_of(self, host: int) -> Path:
        """The log of a host's ranks."""
        return self.log if host == 0 else self.log.with_name(f"{self.log.stem}-host{host}{self.log.suffix}")

    def answer(self, host: int) -> Path:
        """What a host leaves when its ranks have ended."""
        return self.folder / f"host-{host}.json"

    def write(self) -> None:
        """For the hosts; answers and notes of an earlier start are removed."""
        for path in [self.stop_note, *(self.answer(host) for host in range(self.hosts))]:
            path.unlink(missing_ok=True)
        write_json(self.folder / "job.json", asdict(self) | _texts(self))

    @classmethod
    def read(cls, folder: Path) -> Job:
        """What ``write`` left in a folder."""
        values = read_json(folder / "job.json", "magicdrive train writes it")
        return cls(**values | {name: Path(values[name]) for name in ("folder", "log", "status")})

    def outcome(self) -> int:
        """0, or 75: the ranks saved and want to be started again.

        Raises:
            MagicDriveError: of the host that failed first; or a host ended without a word.
        """
        answers = {host: read_json(self.answer(host)) for host in range(self.hosts) if self.answer(host).is_file()}
        failures = [answer for answer in answers.values() if answer["code"] not in (0, RESUMABLE)]
        if failures:
            first = min(failures, key=lambda answer: answer["ended"])
            raise MagicDriveError(first["message"], first["hint"])
        silent = [str(host) for host in range(self.hosts) if host not in answers]
        if silent:
            raise MagicDriveError(
                f"{self.name} has left the queue, and host {', '.join(silent)} of {self.hosts} said nothing of its"
                f" end; logs: {self.folder}, {self.log}",
                "lost host, time or memory limit, or cancelled there; run again to resume from the last checkpoint",
            )
        return int(max(answer["code"] for answer in answers.values()))


def _texts(job: Job) -> dict[str, Any]:
    return {name: str(getattr(job, name)) for name in ("folder", "log", "status")}
