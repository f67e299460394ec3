"""`make up` and `make down`: faults and stubborn processes. A full start takes a minute and is not tested here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Running

from flows import server
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import write_json
from tests.flows.test_children import assert_gone, family


def test_a_port_in_use_is_named_and_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(MagicDriveError, match=f"port {port} cannot be used") as raised:
            server.up(port)
    assert "make up PORT=" in raised.value.hint
    assert list(tmp_path.iterdir()) == []


def test_down_never_signals_another_process_with_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server.HOME.mkdir()
    server.PROCESSES.write_text(f'{{"server": [{os.getpid()}, 1.0]}}')  # the id of this process with another start time
    server.down()
    assert "nothing was running" in capsys.readouterr().out
    assert not server.PROCESSES.exists()


# A worker that stops at once and kills its flow run, as Prefect's does; the run needs a second to close its records.
WORKER = """
import signal, subprocess, sys
run = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
signal.signal(signal.SIGTERM, lambda *_: (run.kill(), sys.exit()))
run.wait()
signal.pause()
"""
FLOW_RUN = """
import os, signal, sys, time
def close(*_):
    time.sleep(1)
    open("closed", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, close)
with open("pids", "w") as file: print(os.getpid(), os.getppid(), file=file)
time.sleep(300)
"""


def test_down_lets_a_flow_run_close_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", WORKER, FLOW_RUN]) as worker:
        pids = family(tmp_path / "pids")
        write_json(server.PROCESSES, {"worker": [worker.pid, psutil.Process(worker.pid).create_time()]})
        server.down()
    assert_gone(pids)
    assert (tmp_path / "closed").exists()


# A server and a worker that record their end; the worker's flow run ignores signals and has a child.
NOTING = """
import signal, sys
def end(*_):
    print(sys.argv[1], file=open("ended", "a"))
    sys.exit()
signal.signal(signal.SIGTERM, end)
"""
SERVER = NOTING + "print(0, file=open('ready', 'w', 1)); signal.pause()"
STUBBORN_WORKER = NOTING + "import subprocess; subprocess.run([sys.executable, '-c', sys.argv[2]]); signal.pause()"
STUBBORN_RUN = """
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
with open("pids", "w") as file: print(os.getpid(), os.getppid(), child.pid, file=file)
child.wait()
"""


def test_down_leaves_nothing_and_stops_the_worker_before_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "RUN_SECONDS", 1.0)
    python = [sys.executable, "-c"]
    with (
        subprocess.Popen([*python, SERVER, "server"]) as api,
        subprocess.Popen([*python, STUBBORN_WORKER, "worker", STUBBORN_RUN]) as worker,
    ):
        pids = [*family(tmp_path / "pids"), api.pid]
        family(tmp_path / "ready")
        processes = {"server": api.pid, "worker": worker.pid}
        write_json(
            server.PROCESSES, {name: [pid, psutil.Process(pid).create_time()] for name, pid in processes.items()}
        )
        server.down()
    assert_gone(pids)
    assert (tmp_path / "ended").read_text().split() == ["worker", "server"]


@pytest.mark.usefixtures("prefect_api")
def test_a_lost_run_frees_the_slot_of_the_pool() -> None:
    """The pool has one slot: a run that never ends would block all others."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("dead")
        deployment = client.create_deployment(flow_id, "dead", work_pool_name=server.POOL)
        dead, waiting = (client.create_flow_run_from_deployment(deployment) for _ in range(2))
        client.set_flow_run_state(dead.id, Running(), force=True)
        server._crash_lost_runs(client)
        states = [client.read_flow_run(run.id).state for run in (dead, waiting)]
    assert [state.type for state in states if state] == [StateType.CRASHED, StateType.SCHEDULED]
