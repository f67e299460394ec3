"""One supervised process group of ``torchrun`` on this host, or this host's part of a larger one.

Log, stall detection, a clean end in every case: the group leads a session of its own, so that Ctrl-C or an
orchestrator's signal reaches only the launcher, which ends the group in order: SIGTERM to the ranks, time to save a
checkpoint, SIGKILL. A pipe on the ranks' standard input closes when the launcher is killed outright; ranks that watch
it (``LAUNCHER_PIPE``) end themselves.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from magicdrive_core.errors import MagicDriveError

RESUMABLE = 75  # exit status of ranks that saved a checkpoint because they were asked to stop (EX_TEMPFAIL)
LAUNCHER_PIPE = "MAGICDRIVE_LAUNCHER_PIPE"  # set in the ranks' environment: end of file on stdin = launcher is gone
GRACE_SECONDS = 25.0  # between SIGTERM and SIGKILL; orchestrators allow 30
POLL_SECONDS = 0.5
# torchrun itself would kill ranks 30 s after such a signal, whatever they still have to save. A scheduler signals every
# process of a host, so that torchrun has to be deaf: the launcher ends the group.
_DEAF_TORCHRUN = """
import signal
for name in ("SIGTERM", "SIGINT", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda *_: None)  # not SIG_IGN, which its ranks would inherit
from torch.distributed.run import main
main()
"""


@dataclass(frozen=True)
class HostPlacement:
    """This host among the hosts of a process group."""

    host: int  # counted from 0
    hosts: int
    address: str  # of host 0
    port: int  # on it


SINGLE_HOST = HostPlacement(0, 1, "127.0.0.1", 0)


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
    """Runs ``command`` on ``ranks`` processes of this host until all of them end.

    Args:
        command: what torchrun shall run: a script and its arguments, or ``-m module arguments``.
        ranks: processes.
        log: their output is appended here.
        status: a file that the ranks touch as they go on.
        stall_seconds: the group is stopped when ``status`` does not change for so long.
        threads: CPU threads of a rank; 0: the host's cores shared evenly.
        environment: variables added to this process's.
        on_poll: called twice a second, e.g. to move a progress bar.
        stop: asked twice a second; once it says yes, the group is ended in order.
        grace_seconds: between SIGTERM and SIGKILL when the group must end early.
        placement: where other hosts run ranks of the same group; ``ranks`` are those of each host.

    Returns:
        0, or ``RESUMABLE``: the ranks saved and want to be started again.

    Raises:
        MagicDriveError: a rank failed (with its last line), or the group stalled.
        BaseException: whatever interrupts the launcher is raised again after the group has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, terminable():
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-c", _DEAF_TORCHRUN, *torchrun_words(command, ranks, placement)],
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
    return _outcome(process.returncode, log, begin, stopped)


def torchrun_words(command: Sequence[str], ranks: int, placement: HostPlacement = SINGLE_HOST) -> list[str]:
    """torchrun's arguments for this host's ranks."""
    if placement.hosts == 1:
        # A rendezvous on a free port, so that no port can be in use; the host's own name need not resolve.
        meeting = ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        meeting = ["--nnodes", str(placement.hosts), "--node-rank", str(placement.host)]
        meeting += ["--master-addr", placement.address, "--master-port", str(placement.port)]
    return [*meeting, "--nproc-per-node", str(ranks), "--signals-to-handle", "SIGHUP", *command]


def _environment(ranks: int, threads: int, placement: HostPlacement) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables = {
        "OMP_NUM_THREADS": str(threads or max(1, cores // ranks)),
        "PYTHONUNBUFFERED": "1",  # the log is complete when a rank is killed
        LAUNCHER_PIPE: "1",
    }
    # Blocks of unequal clips would otherwise leave holes that no other clip's tensors fit into.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"):
        if name not in os.environ:
            variables[name] = "expandable_segments:True"
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback and placement.hosts == 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        variables["GLOO_SOCKET_IFNAME"] = loopback
    return variables


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
                "run again to resume from the last checkpoint; a slower machine needs a larger cluster.stall_seconds",
            )


def _descendants(process: subprocess.Popen[bytes], *, recursive: bool = True) -> list[psutil.Process]:
    """torchrun's children, the ranks, each of which leads a session of its own and would outlive a killed torchrun."""
    try:
        return psutil.Process(process.pid).children(recursive)
    except psutil.NoSuchProcess:
        return []


def _stop(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """SIGTERM to the ranks, and SIGKILL to what is left after the grace."""
    members: list[psutil.Process] = []
    told: set[int] = set()
    end = time.monotonic() + grace_seconds
    try:
        while process.poll() is None and time.monotonic() < end:
            members = _descendants(process) or members
            for rank in _descendants(process, recursive=False):  # also those that were just being started
                if rank.pid not in told:
                    told.add(rank.pid)
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
            member.kill()  # psutil refuses a process id that was given to another process since
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
    """SIGTERM raises in here, where it would otherwise end this process and leave the group behind."""
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


@dataclass(frozen=True)
class _Failure:
    rank: int
    exit_code: int
    reason: str  # last line of what torchrun knows


_FAILURE = re.compile(
    r"^ +rank +: (?P<rank>\d+) .*?^ +exitcode +: (?P<code>-?\d+) .*?^ +traceback : (?P<trace>.*?)(?=^[-=\[]{1})",
    re.MULTILINE | re.DOTALL,
)
_NO_REASON = "To enable traceback see"


def _failures(text: str) -> list[_Failure]:
    """torchrun's report at the end of a log, root cause first."""
    report = text[text.rfind("ChildFailedError:") :] if "ChildFailedError:" in text else ""
    others, _, root = report.partition("Root Cause")
    found = []
    for match in [*_FAILURE.finditer(root), *_FAILURE.finditer(others)]:
        lines = [line.strip() for line in match["trace"].splitlines() if line.strip()]
        reason = lines[-1] if lines and not lines[-1].startswith(_NO_REASON) else ""
        found.append(_Failure(int(match["rank"]), int(match["code"]), reason))
    return found


def _outcome(return_code: int, log: Path, begin: int, stopped: bool) -> int:
    if return_code == 0:
        return 0
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    failures = _failures(text)
    # A rank that was asked to stop before it could listen has nothing to save.
    good = {RESUMABLE, -signal.SIGTERM} if stopped else {RESUMABLE}
    if failures and all(failure.exit_code in good for failure in failures):
        return RESUMABLE
    if not failures:
        if stopped:  # torchrun had to be killed: the ranks did not end in time, or had not been started
            return RESUMABLE
        raise MagicDriveError(f"the launcher's torchrun failed: {_last_line(text)}; log: {log}")
    # A killed rank makes its peers fail too, and within one second the report cannot order them.
    killed = [f for f in failures if f.exit_code < 0 and f.exit_code != -signal.SIGTERM]
    failure = (killed or failures)[0]
    if failure.exit_code < 0:
        what = f"was killed by {signal.Signals(-failure.exit_code).name}"
    else:
        what = "failed: " + re.sub(r"^magicdrive_core\.errors\.\w+: ", "", failure.reason or _last_line(text))
    raise MagicDriveError(f"rank {failure.rank} {what}; log: {log}", "run again to resume from the last checkpoint")


def _last_line(text: str) -> str:
    """The last line that the ranks wrote before torchrun's own report."""
    own = re.compile(r"^[EWI]\d{4} .*torch/distributed/elastic", re.MULTILINE).search(text)
    lines = [line.strip() for line in text[: own.start() if own else None].splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"
