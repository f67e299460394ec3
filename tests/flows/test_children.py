"""Children of flows: they end with the flow, whatever ends it."""

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

import psutil
import pytest

from flows import common
from magicdrive_core.errors import MagicDriveError, UsageError
from tests.conftest import PROJECT

# A child with a child of its own, as `dvc repro` has one; both write their process ids.
FAMILY = ["sh", "-c", 'sleep 300 & echo "$$ $!" > "$0"; wait']


def family(file: Path, seconds: float = 60) -> list[int]:
    """The process ids, as soon as they are written."""
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
    """Undoes that a shell lets the jobs that it starts with ``&`` ignore Ctrl-C, which children inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_failing_verb_s_error_is_the_flow_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through others: DVC says of a stage that failed no more than that it did."""
    monkeypatch.chdir(tmp_path)
    use = [common.tool("magicdrive"), "use", "nowhere"]
    for command in (use, ["sh", "-c", f"{' '.join(use)} || exit 255"]):
        with pytest.raises(UsageError, match="there is no profile 'nowhere'") as raised:
            common.run_child(command, tmp_path / "log")
        assert raised.value.hint == "run in the project's folder"


def test_a_child_of_others_is_told_by_its_command(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"`sh -c 'exit 3'` ended with exit code 3") as raised:
        common.run_child(["sh", "-c", "exit 3"], tmp_path / "logs/shard-1.log")
    assert str(tmp_path / "logs/shard-1.log") in raised.value.hint


def test_a_child_finds_the_tools_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    common.run_child(["sh", "-c", "command -v magicdrive; command -v dvc"], tmp_path / "log")
    assert (tmp_path / "log").read_text().split() == [common.tool("magicdrive"), common.tool("dvc")]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_whole_family(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    threading.Thread(target=lambda: (family(file), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        common.run_child([*FAMILY, str(file)])
    assert_gone(family(file))


def test_children_of_other_threads_end_with_the_body(tmp_path: Path) -> None:
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
    assert len(failures) == 1  # the thread sees a failed child, no silence


def test_a_child_that_begins_while_the_flow_is_interrupted_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there before its thread has noted it, and then nobody else stops it."""
    file, start = tmp_path / "pids", subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        child: subprocess.Popen[bytes] = start(*arguments, **options)
        family(file)
        with suppress(KeyboardInterrupt), common.no_orphans():
            raise KeyboardInterrupt
        return child

    with common.no_orphans():  # whatever was interrupted before
        pass
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(MagicDriveError, match="ended with"):
        common.run_child([*FAMILY, str(file)])
    assert_gone(family(file))


def test_a_terminated_flow_takes_its_children_along(prefect_api: str, tmp_path: Path) -> None:
    """The real shard task has a retry, which a child that was stopped must not get."""
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
def test_ctrl_c_in_a_terminal_ends_a_flow_at_once(tmp_path: Path) -> None:
    """A terminal sends it to the whole group: to Prefect's temporary server as well, to which a flow tells its end."""
    called = tmp_path / "called"
    body = f"""
from prefect import flow
from flows.common import main, run_child
@flow
def work():
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
    with (tmp_path / "said").open("wb") as said, subprocess.Popen(command, stderr=said, **options) as flow:
        try:
            pids = family(called, seconds=240)
            os.killpg(flow.pid, signal.SIGINT)
            assert flow.wait(60) == 130
        finally:
            with suppress(ProcessLookupError):
                os.killpg(flow.pid, signal.SIGKILL)
    assert_gone(pids)
    assert "Traceback" not in (tmp_path / "said").read_text()


def test_an_error_of_the_system_is_two_lines(prefect_api: str, tmp_path: Path) -> None:
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
        (errno.ENOTDIR, [f"error: [Errno {errno.ENOTDIR}] Not a directory: 'runs/x'", " hint: mend that, then run"]),
    ]:
        command = [sys.executable, "-c", body, str(number)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        for line, wanted in zip(done.stderr.splitlines()[-2:], lines, strict=True):
            assert line.startswith(wanted)


def test_a_failed_flow_ends_with_the_cause_and_without_a_traceback(prefect_api: str, tmp_path: Path) -> None:
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
