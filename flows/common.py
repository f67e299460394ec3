"""What the flows share: children that never outlive a flow, and errors that read as one line.

A flow's heavy work runs in child processes, each in a session of its own. When the flow is cancelled (SIGTERM from a
worker, Ctrl-C, a failed neighbour) the whole group of each child is asked to stop, then made to.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL

from magicdrive_core.errors import ERROR_NOTE, MagicDriveError, UsageError, report_error
from magicdrive_core.utils.files import read_json

# SIGINT first: `dvc repro` leaves its stage running on SIGTERM. All of it fits into the 30 s that Prefect gives.
STOP = ((signal.SIGINT, 10.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))

_children: set[subprocess.Popen[bytes]] = set()
_children_lock = threading.Lock()
_interrupted = threading.Event()  # the flow's body was left early: tasks on other threads must not try again


def tool(name: str) -> str:
    """Path of a command of this environment (``magicdrive``, ``dvc``)."""
    return str(Path(sys.executable).with_name(name))


def run_child(
    command: Sequence[str],
    log: Path | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Runs a command to its end in a process group of its own.

    Args:
        command: program and arguments.
        log: where its output goes; by default to this process's own.
        variables: of its environment, beside this process's own, which go first.
        folder: where it runs; by default where this process does.

    Raises:
        MagicDriveError: it ended with another exit code than 0; the message is its own where it is of this project.
        UsageError: likewise, where that was one.
    """
    with TemporaryDirectory(prefix="magicdrive-") as notes, _output(log) as output:
        note = Path(notes) / "error.json"
        bin_folder = str(Path(sys.executable).parent)  # dvc.yaml's commands are found there
        path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
        environment = {**(variables or {}), **os.environ} | {"PATH": path, ERROR_NOTE: str(note)}
        before = _interrupted.is_set()  # long ago: then this child has nothing to do with it
        child = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
        try:
            with _children_lock:
                _children.add(child)
                late = _interrupted.is_set() and not before  # `no_orphans` has looked for children already
            if late:
                stop_child(child)
            code = child.wait()
        except BaseException:
            stop_child(child)
            raise
        finally:
            with _children_lock:
                _children.discard(child)
        if code:
            raise _failure(command, code, note, log)


def stop_child(child: subprocess.Popen[bytes]) -> None:
    """Ends a child's whole process group, politely first."""
    for number, seconds in STOP:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            break
    with suppress(ProcessLookupError):  # grandchildren that outlived it
        os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def no_orphans() -> Iterator[None]:
    """Stops the children that tasks on other threads still wait for when the flow's body is interrupted.

    Signals reach the main thread only, so that a mapped task never sees the cancellation itself.
    """
    _interrupted.clear()
    try:
        yield
    except BaseException:
        _interrupted.set()
        with _children_lock:
            children = list(_children)
        for child in children:
            stop_child(child)
        raise


def unless_interrupted(*_: object) -> bool:
    """Prefect's ``retry_condition_fn``: a child that failed gets another try, one that was stopped does not."""
    return not _interrupted.is_set()


@task(cache_policy=NO_CACHE, task_run_name="{verb}")
def run_verb(verb: str, *arguments: str) -> None:
    """A task that runs one ``magicdrive`` verb as a child."""
    run_child([tool("magicdrive"), verb, *arguments])


def setting_words(params: str, overrides: Sequence[str] | None) -> list[str]:
    """The command line words that hand a flow's settings to a verb."""
    return ["--params", params, *(word for override in overrides or () for word in ("-S", override))]


def flow_command(run: Callable[[str, list[str] | None], object]) -> Callable[[], None]:
    """The command line of a flow that takes the settings' file and overrides."""

    def command(
        params: Annotated[str, typer.Option(metavar="FILE", help="The settings' file.")] = "params.yaml",
        overrides: Annotated[list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE")] = None,
    ) -> None:
        run(params, overrides)

    return lambda: typer.run(command)


def main(run: Callable[[], object]) -> None:
    """Runs a flow from the command line; what a user can mend is one line and a hint, as with ``magicdrive``."""
    _one_line_errors()
    try:
        _start_server()
        run()
    except (MagicDriveError, OSError) as error:
        sys.exit(report_error(error, "mend that, then run again: what is done is kept").exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _start_server() -> None:
    """Prefect's temporary server, where none is configured, out of reach of Ctrl-C.

    A terminal sends that to the server too, and a flow whose server is gone calls for it for minutes before it ends.
    """
    if not PREFECT_API_URL.value():
        from prefect.server.api.server import SubprocessASGIServer  # seconds to import, needed here alone

        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server inherits it
        try:
            SubprocessASGIServer().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_line_errors() -> None:
    """Prefect prints each failure with its traceback, then once more as the run's last state: that line is enough.

    The server's record of the run keeps the traceback.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], MagicDriveError | OSError))

    for handler in logging.getLogger().handlers:  # Prefect's console
        handler.addFilter(wanted)


@contextmanager
def _output(log: Path | None) -> Iterator[int | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        yield file.fileno()


def _failure(command: Sequence[str], code: int, note: Path, log: Path | None) -> MagicDriveError:
    """The error that a child left behind, or what can be said of one that left none."""
    if note.is_file():
        message, hint, exit_code = read_json(note)
        return (UsageError if exit_code == UsageError.exit_code else MagicDriveError)(message, hint)
    words = " ".join([Path(command[0]).name, *map(shlex.quote, command[1:])])
    return MagicDriveError(
        f"`{words}` ended with exit code {code}",
        f"its output stands in {log}" if log else "its own message stands above",
    )
