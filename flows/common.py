"""What the flows share: child processes that never outlive a flow, and errors of one line.

A flow's heavy work runs in child processes, each in its own session. When the flow is cancelled (SIGTERM from a worker,
Ctrl-C, another task that failed), the process group of each child is asked to stop and then killed.
"""

from __future__ import annotations

import logging
import os
import secrets
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
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_CORS_ALLOWED_ORIGINS,
    temporary_settings,
)

from magicdrive_core.errors import ERROR_NOTE, MagicDriveError, UsageError, report_error
from magicdrive_core.utils.files import private_folder, read_json

# SIGINT first: on SIGTERM, `dvc repro` leaves its stage running. The sum fits into the 30 s that Prefect allows.
STOP = ((signal.SIGINT, 10.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))

_children: set[subprocess.Popen[bytes]] = set()
_children_lock = threading.Lock()
_interrupted = threading.Event()  # the flow's body has failed or was cancelled: tasks on other threads must not retry


def tool(name: str) -> str:
    """Returns the path of a command of this environment.

    Args:
        name: such as ``magicdrive`` or ``dvc``.

    Returns:
        The command in the folder of this process's Python; whether it exists is not checked.
    """
    return str(Path(sys.executable).with_name(name))


def run_child(
    command: Sequence[str],
    log: Path | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> None:
    """Runs a command in its own process group and waits for it.

    Args:
        command: program and arguments.
        log: file for its output; None: the output of this process.
        variables: additional environment variables; those of this process take precedence.
        folder: working directory; None: that of this process.

    Raises:
        MagicDriveError: the command failed; a command of this project supplies the message.
        UsageError: a command of this project failed with this error.
    """
    with TemporaryDirectory(prefix="magicdrive-") as notes, _output(log) as output:
        note = Path(notes) / "error.json"
        bin_folder = str(Path(sys.executable).parent)  # where dvc.yaml's commands are found
        path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
        environment = {**(variables or {}), **os.environ} | {"PATH": path, ERROR_NOTE: str(note)}
        before = _interrupted.is_set()  # an earlier interruption does not concern this child
        child: subprocess.Popen[bytes] | None = None
        try:
            with _deferred_signals():  # an exception within Popen would leave a child that nobody knows
                child = subprocess.Popen(
                    command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
                )
                with _children_lock:
                    _children.add(child)
                    late = _interrupted.is_set() and not before  # `no_orphans` has already stopped those it knew
            if late:
                stop_child(child)
            code = child.wait()
        except BaseException:
            if child is not None:
                stop_child(child)
            raise
        finally:
            if child is not None:
                with _children_lock:
                    _children.discard(child)
        if code:
            raise _failure(command, code, note, log)


def stop_child(child: subprocess.Popen[bytes]) -> None:
    """Stops a child's whole process group: SIGINT, then SIGTERM, then SIGKILL, with the times of ``STOP`` between them.

    Args:
        child: leader of its process group; it may have ended already.
    """
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
    """Stops the children of tasks on other threads when the flow's body is interrupted.

    Signals reach only the main thread, so a mapped task never sees the cancellation itself.
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
    """Returns whether Prefect may retry a task (``retry_condition_fn``): a failed child yes, a stopped child no.

    Args:
        *_: task, task run and state, with which Prefect calls this; they do not matter.

    Returns:
        False once the body of the flow has failed or was cancelled.
    """
    return not _interrupted.is_set()


@task(cache_policy=NO_CACHE, task_run_name="{verb}")
def run_verb(verb: str, *arguments: str) -> None:
    """Runs one ``magicdrive`` verb as a child process.

    Args:
        verb: such as ``synth`` or ``package``.
        *arguments: options of the verb, one word each.

    Raises:
        MagicDriveError: the verb failed, with its own message.
    """
    run_child([tool("magicdrive"), verb, *arguments])


def setting_words(params: str, overrides: Sequence[str] | None) -> list[str]:
    """Returns the options that hand a flow's settings to a verb.

    Args:
        params: the file of settings.
        overrides: ``key.key=value`` texts; None: none.

    Returns:
        Words of a command line: ``--params FILE``, and ``-S KEY=VALUE`` for each override.
    """
    return ["--params", params, *(word for override in overrides or () for word in ("-S", override))]


def flow_command(run: Callable[[str, list[str] | None], object]) -> Callable[[], None]:
    """Makes the command line of a flow that takes a file of settings and overrides.

    Args:
        run: the flow; called with the file's name and ``key.key=value`` texts, or None where there are none.

    Returns:
        A function that parses this process's command line and runs the flow, for ``main``.
    """

    def command(
        params: Annotated[str, typer.Option(metavar="FILE", help="The file of settings.")] = "params.yaml",
        overrides: Annotated[list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE")] = None,
    ) -> None:
        run(params, overrides)

    return lambda: typer.run(command)


def main(run: Callable[[], object]) -> None:
    """Runs a flow from the command line. An error that the user can fix is one line and a hint, as in `magicdrive`.

    Args:
        run: the flow without arguments; its result is ignored.

    Raises:
        SystemExit: with the exit code of the error, or with 130 after Ctrl-C; other errors keep their traceback.
    """
    _one_line_errors()
    with exit_codes(), _flow_server():
        run()


@contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process after an error that the user can fix with one line, a hint and the error's exit code.

    Raises:
        SystemExit: with the exit code of the error, or with 130 after Ctrl-C; other errors keep their traceback.
    """
    try:
        yield
    except (MagicDriveError, OSError) as error:
        sys.exit(report_error(error, "fix this and run again; finished work is reused").exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def new_password() -> str:
    """Makes a password for Prefect's API, which can start processes for whoever may use it.

    Returns:
        ``user:password``, as Prefect wants it, with 256 random bits.
    """
    return f"magicdrive:{secrets.token_urlsafe(32)}"


@contextmanager
def _flow_server() -> Iterator[None]:
    """Starts Prefect's temporary server, if none is configured, so that Ctrl-C does not reach it.

    A terminal sends Ctrl-C to the server too, and a flow whose server is gone retries its calls for minutes. The server
    asks for a password that only this process knows: a page in the user's browser could otherwise leave a flow run in
    the database, for the worker of the next ``make up``.
    """
    if PREFECT_API_URL.value():
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer  # takes seconds to import

    private_folder(PREFECT_HOME.value())
    password = new_password()
    settings = {
        PREFECT_API_AUTH_STRING: password,
        PREFECT_SERVER_API_AUTH_STRING: password,
        PREFECT_SERVER_CORS_ALLOWED_ORIGINS: "http://127.0.0.1",  # of no page
    }
    with temporary_settings(settings):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server inherits it
        try:
            SubprocessASGIServer().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield


def _one_line_errors() -> None:
    """Drops the tracebacks of known errors from Prefect's console, which prints each failure twice.

    The server's record of the run keeps the traceback.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], MagicDriveError | OSError))

    for handler in logging.getLogger().handlers:  # Prefect's console
        handler.addFilter(wanted)


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Delays SIGINT and SIGTERM to the end of the block; on other threads than the main one they never arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


@contextmanager
def _output(log: Path | None) -> Iterator[int | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        yield file.fileno()


def _failure(command: Sequence[str], code: int, note: Path, log: Path | None) -> MagicDriveError:
    """Returns the error that a child left in its note, or one that names its command and exit code."""
    if note.is_file():
        message, hint, exit_code = read_json(note)
        return (UsageError if exit_code == UsageError.exit_code else MagicDriveError)(message, hint)
    words = " ".join([Path(command[0]).name, *map(shlex.quote, command[1:])])
    return MagicDriveError(
        f"`{words}` ended with exit code {code}",
        f"see its output in {log}" if log else "see the lines above",
    )
