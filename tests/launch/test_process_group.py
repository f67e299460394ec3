"""The supervised process group, with a small script as its ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.launch.process_group import RESUMABLE, HostPlacement, interface_towards, run_group

AGENT = "magicdrive_core.launch.elastic"
SCRIPT = """
import os, pathlib, select, signal, sys, time
rank, folder, mode = int(os.environ["RANK"]), pathlib.Path(sys.argv[1]), sys.argv[2]
def save(*_):
    (folder / f"saved-{rank}").touch()
    sys.exit(75)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "saves":
    signal.signal(signal.SIGTERM, save)
(folder / f"started-{rank}").write_text(str(os.getpid()))
print(f"rank {rank} uses {os.environ['OMP_NUM_THREADS']} threads")
while not (folder / f"started-{1 - rank}").exists():
    time.sleep(0.01)
if mode == "fail" and rank == 1:
    raise ValueError("the disk is on fire")
if mode == "recorded":
    from torch.distributed.elastic.multiprocessing.errors import record
    from magicdrive_core.errors import MagicDriveError
    @record
    def fail():
        raise MagicDriveError("no clip is left")
    if rank == 1:
        time.sleep(120)
    try:
        fail()
    finally:
        print("later line", flush=True)
        os._exit(1)
if mode == "resumable":
    sys.exit(75)
if mode == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "killed":  # the peer fails in its next collective
    import contextlib, psutil
    with contextlib.suppress(psutil.NoSuchProcess):
        peer = psutil.Process(int((folder / "started-1").read_text()))
        while peer.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    raise ConnectionError("the peer is gone")
if mode == "orphan":
    select.select([sys.stdin], [], [])
    (folder / f"noticed-{rank}").touch()
    sys.exit(0)
if mode == "meet":
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    (folder / f"met-{rank}").touch()
    while not (folder / "seen").exists():
        time.sleep(0.01)
    sys.exit(0)
if mode != "ok":
    time.sleep(120)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def launch(script: Path, mode: str, **settings: object) -> int:
    folder = script.parent
    values = {"log": folder / "log.txt", "status": folder / "status.json", "stall_seconds": 60, "grace_seconds": 3}
    return run_group([str(script), str(folder), mode], 2, **values | settings)  # type: ignore[arg-type]


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{paths} did not appear"
        time.sleep(0.05)


def assert_ended(script: Path) -> None:
    for rank in range(2):
        pid = int((script.parent / f"started-{rank}").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_group_that_ends_well(script: Path) -> None:
    polls = []
    assert launch(script, "ok", threads=3, on_poll=lambda: polls.append(1)) == 0
    assert "rank 1 uses 3 threads" in (script.parent / "log.txt").read_text()
    assert polls


def test_a_local_group_listens_on_loopback_only(script: Path) -> None:
    folder, addresses = script.parent, set()

    def look() -> None:
        if (folder / "met-0").exists() and (folder / "met-1").exists():
            (agent,) = (each for each in psutil.Process().children() if AGENT in each.cmdline())
            for process in [agent, *agent.children(recursive=True)]:
                listening = [each for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
                addresses.update(each.laddr.ip for each in listening)
            (folder / "seen").touch()

    assert launch(script, "meet", on_poll=look) == 0
    assert addresses == {"127.0.0.1"}


def test_ranks_that_saved_may_be_started_again(script: Path) -> None:
    assert launch(script, "resumable") == RESUMABLE


def test_a_failing_rank_is_named_with_its_exception(script: Path) -> None:
    with pytest.raises(MagicDriveError) as caught:
        launch(script, "fail")
    assert caught.value.message.startswith("rank 1 failed: ValueError: the disk is on fire; log: ")
    assert_ended(script)


def test_the_reason_of_a_failure_is_what_the_rank_recorded(script: Path) -> None:
    """A rank may write more after its exception; the recorded exception counts, without the project's own class."""
    with pytest.raises(MagicDriveError) as caught:
        launch(script, "recorded")
    assert caught.value.message.startswith("rank 0 failed: no clip is left; log: ")


def test_a_killed_rank_is_named_and_ends_the_others(script: Path) -> None:
    with pytest.raises(MagicDriveError, match="rank 1 was killed by SIGKILL"):
        launch(script, "killed")
    assert_ended(script)


def test_a_stalled_group_is_stopped_though_it_ignores_signals(script: Path) -> None:
    with pytest.raises(MagicDriveError, match="no progress for 8 s"):
        launch(script, "deaf", stall_seconds=8, grace_seconds=0.5)
    assert_ended(script)


def test_a_command_that_does_not_exist_is_reported_with_the_last_line(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"can't open file .*missing\.py"):
        launch(tmp_path / "missing.py", "ok")


def test_the_failing_rank_of_another_host_is_named_by_its_global_rank(script: Path) -> None:
    """Two launchers on this machine stand for two hosts of one rank each."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder, messages = script.parent, {}

    def run(host: int) -> None:
        paths = {"log": folder / f"log-{host}.txt", "status": folder / f"status-{host}"}
        placement = HostPlacement(host, 2, "127.0.0.1", port)
        try:
            run_group([str(script), str(folder), "fail"], 1, **paths, stall_seconds=60, placement=placement)
        except MagicDriveError as error:
            messages[host] = error.message

    hosts = [threading.Thread(target=run, args=(host,)) for host in range(2)]
    hosts[1].start()
    wait_for(folder / "log-1.txt")
    hosts[0].start()
    hosts[1].join(60)
    assert messages[1].startswith("rank 1 failed: ValueError: the disk is on fire; log: ")
    os.kill(int((folder / "started-0").read_text()), signal.SIGKILL)
    hosts[0].join(60)
    assert messages[0].startswith("rank 0 was killed by SIGKILL")


def test_sigterm_to_the_launcher_lets_the_ranks_save(script: Path) -> None:
    launcher = _launcher(script, "saves")
    wait_for(script.parent / "started-0", script.parent / "started-1")
    launcher.terminate()
    assert launcher.wait(30) == 128 + signal.SIGTERM
    assert (script.parent / "saved-0").exists()
    assert (script.parent / "saved-1").exists()
    assert_ended(script)


def test_ranks_notice_that_their_launcher_was_killed(script: Path) -> None:
    launcher = _launcher(script, "orphan")
    wait_for(script.parent / "started-0", script.parent / "started-1")
    launcher.kill()
    launcher.wait()
    wait_for(script.parent / "noticed-0", script.parent / "noticed-1")


def test_an_exception_of_the_caller_ends_the_group(script: Path) -> None:
    def fail() -> None:
        if (script.parent / "started-0").exists() and (script.parent / "started-1").exists():
            raise RuntimeError("cancelled")

    errors: list[BaseException] = []

    def run() -> None:
        try:
            launch(script, "sleep", on_poll=fail)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)  # an orchestrator's task may run on a thread, where signals are out of reach
    thread.start()
    thread.join(60)
    assert str(errors[0]) == "cancelled"
    assert_ended(script)


def _launcher(script: Path, mode: str) -> subprocess.Popen[bytes]:
    code = (
        "import pathlib, sys; from magicdrive_core.launch.process_group import run_group\n"
        "f = pathlib.Path(sys.argv[2]);"
        "run_group(sys.argv[1:], 2, log=f / 'log.txt', status=f / 'status', stall_seconds=60, grace_seconds=20)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(script), str(script.parent), mode], env=os.environ.copy())


def test_groups_meet_on_the_interface_that_reaches_the_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface_towards("127.0.0.1") in psutil.net_if_addrs()
    assert interface_towards("no-such-host.invalid") is None

    class Probe(socket.socket):
        def connect(self, _: object) -> None: ...

        def getsockname(self) -> tuple[str, int]:
            return own, 9

    addresses = {
        "lo": [mock.Mock(address="127.0.0.1")],
        "eth0": [mock.Mock(address="192.168.0.7")],
        "ib0": [mock.Mock(address="10.0.0.7"), mock.Mock(address="fe80::1")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(socket, "socket", Probe)
    own = "10.0.0.7"
    assert interface_towards("10.0.0.1") == "ib0"
    own = "127.0.1.1"  # this host's own name, as Debian writes it into /etc/hosts: no other host reaches it
    assert interface_towards("10.0.0.1") is None
