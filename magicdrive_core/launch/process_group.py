"""A supervised process group: the ranks of this host, alone or as part of a group of several hosts.

``run_group`` starts the agent (elastic.py), which starts the ranks. It keeps their log, detects stalls, and ends the
group in order in every case. The agent leads a session of its own, so that Ctrl-C or an orchestrator's signal reaches
only the launcher, which sends SIGTERM to the ranks, waits while they save a checkpoint, and then sends SIGKILL. A pipe
on the ranks' standard input closes when the launcher is killed outright; ranks that watch it (``LAUNCHER_PIPE``) stop.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json

RESUMABLE = 75  # exit status of ranks that saved a checkpoint because a stop was requested (EX_TEMPFAIL)
LAUNCHER_PIPE = "MAGICDRIVE_LAUNCHER_PIPE"  # set in the ranks' environment: end of file on stdin = launcher is gone
GRACE_SECONDS = 25.0  # between SIGTERM and SIGKILL; orchestrators allow 30
POLL_SECONDS = 0.5
LOOPBACK = "127.0.0.1"
RESUME_HINT = "run the same command again to resume from the last checkpoint"


@dataclass(frozen=True)
class HostPlacement:
    """This host among the hosts of a process group.

    Attributes:
        host: number of this host, from 0.
        hosts: how many there are.
        address: network address of host 0.
        port: on host 0 where all hosts meet.
    """

    host: int
    hosts: int
    address: str
    port: int


SINGLE_HOST = HostPlacement(0, 1, LOOPBACK, 0)


@dataclass(frozen=True)
class RankFailure:
    """A rank that did not exit with 0.

    Attributes:
        rank: global rank.
        exit_code: exit status of the process; a negative one is the signal that ended it.
        reason: the exception that ended the rank, in one line; empty where it recorded none.
    """

    rank: int
    exit_code: int
    reason: str


def run_group(
    command: Sequence[str],
    ranks: int,
    *,
    log: Path,
    status: Path,
    stall_seconds: float,
    threads: int = 0,
    environment: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
    stop: Callable[[], bool] | None = None,
    grace_seconds: float = GRACE_SECONDS,
    placement: HostPlacement = SINGLE_HOST,
) -> int:
    """Run a command on ``ranks`` processes of this host until all of them end.

    Args:
        command: what each rank runs: a script and its arguments, or ``-m module arguments``.
        ranks: processes on this host.
        log: file to which their output is appended.
        status: a file that the ranks touch while they make progress.
        stall_seconds: the group is stopped when ``status`` has not changed for this long.
        threads: CPU threads of a rank; 0 shares the host's cores evenly.
        environment: variables added to this process's; None: none.
        on_poll: called twice a second, e.g. to move a progress bar; None: nothing.
        stop: called twice a second; once it returns True, the group is ended in order. None: it runs to its end.
        grace_seconds: between SIGTERM and SIGKILL when the group must end early.
        placement: this host among the hosts of the group, which run as many ranks each.

    Returns:
        0, or ``RESUMABLE`` when the ranks saved a checkpoint and want to be started again.

    Raises:
        MagicDriveError: a rank failed (the message has its reason), or the group stalled.
        BaseException: whatever interrupted the launcher, raised again after the group has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output, terminable():
        report = Path(folder) / "failures.json"
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, *agent_command(command, ranks, placement, report)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(ranks, threads, placement), **(environment or {})},
            start_new_session=True,
        )
        members: list[psutil.Process] = []
        stopped = False
        try:
            watch = _StallWatch(status, stall_seconds)
            while process.poll() is None:
                members = _descendants(process) or members
                watch.check(log)
                if on_poll is not None:
                    on_poll()
                if stop is not None and stop():
                    stopped = True
                    _stop(process, grace_seconds)
                with _suppress_timeout():
                    process.wait(POLL_SECONDS)
        except BaseException:
            _stop(process, grace_seconds)
            raise
        finally:
            _kill(members)
            if process.stdin is not None:
                process.stdin.close()
        failures = [RankFailure(**each) for each in read_json(report)] if report.is_file() else []
    return 0 if process.returncode == 0 else _outcome(failures, log, start, stopped)


def agent_command(
    command: Sequence[str], ranks: int, placement: HostPlacement = SINGLE_HOST, failures: Path | None = None
) -> list[str]:
    """Make the command line of the agent that runs this host's ranks; see elastic.py.

    Args:
        command: what each rank runs: a script and its arguments, or ``-m module arguments``.
        ranks: processes on this host.
        placement: this host among the hosts of the group.
        failures: file to which the agent writes the ranks that failed, as JSON; None: it prints them.

    Returns:
        Arguments of the Python interpreter.
    """
    words = ["-m", "magicdrive_core.launch.elastic", "--ranks", str(ranks)]
    if placement.hosts > 1:
        words += ["--hosts", str(placement.hosts), "--host", str(placement.host)]
        words += ["--address", placement.address, "--port", str(placement.port)]
    if failures is not None:
        words += ["--failures", str(failures)]
    return [*words, "--", *command]


def _environment(ranks: int, threads: int, placement: HostPlacement) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables = {
        "OMP_NUM_THREADS": str(threads or max(1, cores // ranks)),
        "PYTHONUNBUFFERED": "1",  # the log is complete when a rank is killed
        LAUNCHER_PIPE: "1",
    }
    # Without it, clips of unequal length leave holes in the device's memory that no other clip's tensors fit into.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"):
        if name not in os.environ:
            variables[name] = "expandable_segments:True"
    interface = interface_towards(placement.address)
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        variables["GLOO_SOCKET_IFNAME"] = interface
    return variables


def interface_towards(address: str) -> str | None:
    """Find the network interface through which this host reaches another one.

    Without its name gloo takes the interface that this host's own name resolves to, often that of 127.0.1.1, which no
    other host reaches.

    Args:
        address: name or number of the other host, or of this one.

    Returns:
        The interface's name; None where it cannot be told, or where another host would be reached by the loopback.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # chooses a route; nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127.") and address != LOOPBACK:
        return None
    interfaces = psutil.net_if_addrs()
    return next((name for name, held in interfaces.items() if any(each.address == own for each in held)), None)


class _StallWatch:
    """Raises when a file has not changed for too long."""

    def __init__(self, status: Path, seconds: float) -> None:
        self.status, self.seconds = status, seconds
        self.seen, self.since = self._stamp(), time.monotonic()

    def _stamp(self) -> int:
        try:
            return self.status.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def check(self, log: Path) -> None:
        stamp = self._stamp()
        if stamp != self.seen:
            self.seen, self.since = stamp, time.monotonic()
        elif time.monotonic() - self.since > self.seconds:
            raise MagicDriveError(
                f"no progress for {self.seconds:.0f} s: the processes were stopped; log: {log}",
                f"{RESUME_HINT}; a slower machine needs a larger cluster.stall_seconds",
            )


def _descendants(process: subprocess.Popen[bytes], *, recursive: bool = True) -> list[psutil.Process]:
    """Return the agent's children, the ranks; each leads its own session and would outlive a killed agent."""
    try:
        return psutil.Process(process.pid).children(recursive)
    except psutil.NoSuchProcess:
        return []


def _stop(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Send SIGTERM to the ranks, and SIGKILL to all that still run after the grace."""
    members: list[psutil.Process] = []
    signalled: set[int] = set()
    end = time.monotonic() + grace_seconds
    try:
        while process.poll() is None and time.monotonic() < end:
            members = _descendants(process) or members
            for rank in _descendants(process, recursive=False):  # also those that have just been started
                if rank.pid not in signalled:
                    signalled.add(rank.pid)
                    with suppress(psutil.NoSuchProcess):
                        rank.terminate()
            with _suppress_timeout():
                process.wait(POLL_SECONDS)
    finally:  # also when a second interrupt ends the wait
        if process.poll() is None:
            process.kill()
        _kill(members)
        process.wait()


def _kill(members: list[psutil.Process]) -> None:
    for member in members:
        try:
            member.kill()  # psutil refuses a process id that another process has now
        except psutil.NoSuchProcess:
            continue


@contextmanager
def _suppress_timeout() -> Iterator[None]:
    try:
        yield
    except subprocess.TimeoutExpired:
        return


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block; it would end this process and leave the group running.

    On other threads than the main one, and where the process handles SIGTERM already, the block changes nothing.

    Raises:
        SystemExit: with 143 (128 + SIGTERM), where a SIGTERM arrived.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _outcome(failures: Sequence[RankFailure], log: Path, start: int, stopped: bool) -> int:
    """Return ``RESUMABLE`` where the ranks may be started again, and raise the first failure otherwise.

    Args:
        failures: the earliest first; none where the agent itself failed or was killed.
        log: output of the ranks.
        start: byte at which the log of this start begins.
        stopped: whether the launcher ended the group because a stop was requested.
    """
    # A rank that gets SIGTERM before it handles signals has nothing to save.
    good = {RESUMABLE, -signal.SIGTERM} if stopped else {RESUMABLE}
    if failures and all(failure.exit_code in good for failure in failures):
        return RESUMABLE
    if not failures:
        if stopped:  # the agent had to be killed: ranks did not end in time, or had not been started
            return RESUMABLE
        raise MagicDriveError(f"the ranks could not be started: {_last_line(log, start)}; log: {log}")
    # A killed rank makes its peers fail too, and torch's times are whole seconds, too coarse to order them.
    killed = [each for each in failures if each.exit_code < 0 and each.exit_code != -signal.SIGTERM]
    failure = (killed or failures)[0]
    if failure.exit_code < 0:
        what = f"was killed by {signal.Signals(-failure.exit_code).name}"
    else:
        what = f"failed: {failure.reason.removeprefix('MagicDriveError: ') or _last_line(log, start)}"
    raise MagicDriveError(f"rank {failure.rank} {what}; log: {log}", RESUME_HINT)


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "they wrote nothing"
