"""Child processes of flows: none outlives the flow, whatever stops it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import common
from magicdrive_core.errors import MagicDriveError, UsageError
from tests.conftest import PROJECT

# A child with a child of its own, as `dvc repro` has one; both write their process ids.
FAMILY = ["sh", "-c", 'sleep 300 & echo "$$ $!" > "$0"; wait']


def family(file: Path, seconds: float = 60) -> list[int]:
    """Waits for the process ids in a file and returns them."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if file.exists() and (words := file.read_text().split()):
            return [int(word) for word in words]
        time.sleep(0.05)
    raise AssertionError("the child did not start")


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {alive}")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restores Ctrl-C, which a shell makes its background jobs and their children ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_error_of_a_failed_verb_reaches_the_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error also passes through other programs: DVC reports only that a stage failed."""
    monkeypatch.chdir(tmp_path)
    use = [common.tool("magicdrive"), "use", "nowhere"]
    for command in (use, ["sh", "-c", f"{' '.join(use)} || exit 255"]):
        with pytest.raises(UsageError, match="there is no profile 'nowhere'") as raised:
            common.run_child(command, tmp_path / "log")
        assert raised.value.hint == "run in the project's folder"


def test_the_error_of_another_program_names_its_command_and_log(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"`sh -c 'exit 3'` ended with exit code 3") as raised:
        common.run_child(["sh", "-c", "exit 3"], tmp_path / "logs/shard-1.log")
    assert str(tmp_path / "logs/shard-1.log") in raised.value.hint


def test_a_child_finds_the_tools_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    common.run_child(["sh", "-c", "command -v magicdrive; command -v dvc"], tmp_path / "log")
    assert (tmp_path / "log").read_text().split() == [common.tool("magicdrive"), common.tool("dvc")]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_child_and_grandchild(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    threading.Thread(target=lambda: (family(file), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        common.run_child([*FAMILY, str(file)])
    assert_gone(family(file))


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_child_is_being_started_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child exists before Popen returns; an exception in between would leave it to nobody."""
    file, start = tmp_path / "pids", subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        child: subprocess.Popen[bytes] = start(*arguments, **options)
        family(file)
        os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.run_child([*FAMILY, str(file)])
    assert_gone(family(file))


def test_children_of_other_threads_stop_with_the_body(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    failures: list[MagicDriveError] = []

    def work() -> None:
        try:
            common.run_child([*FAMILY, str(file)])
        except MagicDriveError as error:
            failures.append(error)

    def body() -> None:
        with common.no_orphans():
            thread.start()
            family(file)
            raise RuntimeError("elsewhere")

    thread = threading.Thread(target=work)
    with pytest.raises(RuntimeError, match="elsewhere"):
        body()
    thread.join(30)
    assert_gone(family(file))
    assert len(failures) == 1  # the thread sees that its child failed


def test_a_child_that_starts_while_the_flow_is_interrupted_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child may start before its thread has recorded it; then nobody else stops it."""
    file, start = tmp_path / "pids", subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        child: subprocess.Popen[bytes] = start(*arguments, **options)
        family(file)
        with suppress(KeyboardInterrupt), common.no_orphans():
            raise KeyboardInterrupt
        return child

    with common.no_orphans():  # forgets earlier interruptions
        pass
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(MagicDriveError, match="ended with"):
        common.run_child([*FAMILY, str(file)])
    assert_gone(family(file))


def test_a_terminated_flow_stops_its_children(prefect_api: str, tmp_path: Path) -> None:
    """A stopped child must not be retried, although the real shard task has a retry."""
    called, submitted, program = tmp_path / "called", tmp_path / "submitted", tmp_path / "magicdrive"
    program.write_text(f'#!/bin/sh\nsleep 300 & echo "$$ $!" >> {submitted}; wait\n')
    program.chmod(0o755)
    body = f"""
from prefect import flow, task
from flows import generate
from flows.common import no_orphans, run_child
generate.tool = lambda _: {str(program)!r}
body = task(run_child)
@flow
def work():
    with no_orphans():
        generate.generate_shard.submit("1/1", [], None, None)
        body({FAMILY!r} + [{str(called)!r}])
work()
"""
    environment = os.environ | {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, "-c", body], cwd=tmp_path, env=environment) as flow:
        try:
            pids = family(called) + family(submitted)
            flow.terminate()
            assert flow.wait(60) != 0
        finally:
            flow.kill()  # a flow that starts its children again would wait for them
    assert family(called) + family(submitted) == pids  # nothing was started again
    assert_gone(pids)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_terminal_stops_a_flow_at_once(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the whole group, also to Prefect's temporary server, which the flow still needs."""
    called = tmp_path / "called"
    body = f"""
from prefect import flow
from flows.common import main, run_child
from prefect.server.api.server import SubprocessASGIServer
@flow
def work():
    open("address", "w").write(SubprocessASGIServer().api_url)
    run_child({FAMILY!r} + [{str(called)!r}])
main(work)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PYTHONPATH": str(PROJECT),
    }
    command = [sys.executable, "-c", body]
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "start_new_session": True}
    with (tmp_path / "output").open("wb") as output, subprocess.Popen(command, stderr=output, **options) as flow:
        try:
            pids = family(called, seconds=240)
            api = (tmp_path / "address").read_text()
            assert httpx.post(f"{api}/flows/filter", json={}, timeout=60).status_code == 401  # for the flow alone
            os.killpg(flow.pid, signal.SIGINT)
            assert flow.wait(60) == 130
        finally:
            with suppress(ProcessLookupError):
                os.killpg(flow.pid, signal.SIGKILL)
    assert_gone(pids)
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_a_system_error_is_two_lines(prefect_api: str, tmp_path: Path) -> None:
    body = """
import errno, os, sys
from prefect import flow, task
from flows.common import main
number = int(sys.argv[1])
@task
def inner():
    raise OSError(number, os.strerror(number), "runs/x")
@flow
def outer():
    inner()
main(outer)
"""
    environment = os.environ | {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(PROJECT)}
    for number, lines in [
        (
            errno.ENOSPC,
            ["error: no space left on the disk of runs/x: No space left on device", " hint: free some space"],
        ),
        (errno.ENOTDIR, [f"error: [Errno {errno.ENOTDIR}] Not a directory: 'runs/x'", " hint: fix this and run again"]),
    ]:
        command = [sys.executable, "-c", body, str(number)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        said = done.stderr.splitlines()
        start = next(index for index, line in enumerate(said) if line.startswith("error: "))
        for line, wanted in zip(said[start : start + 2], lines, strict=True):
            assert line.startswith(wanted)


def test_a_failed_flow_prints_the_cause_without_a_traceback(prefect_api: str, tmp_path: Path) -> None:
    body = """
from prefect import flow
from flows.common import main, run_verb
@flow
def inner():
    run_verb("infos", "-S", "data.rot=1")
@flow
def outer():
    inner()
main(outer)
"""
    (tmp_path / "params.yaml").write_text((PROJECT / "profiles/demo.yaml").read_text())
    environment = os.environ | {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", body]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: params.yaml: data.rot is not a known key")
