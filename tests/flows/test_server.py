"""`make up` where it cannot work; that it works is tried by hand (docs/flows.md), because it takes a minute."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from flows import server
from magicdrive_core.errors import MagicDriveError


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


def test_down_stops_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server.HOME.mkdir()
    server.PROCESSES.write_text(f'{{"server": [{os.getpid()}, 1.0]}}')  # this process's number, another one's birth
    server.down()
    assert "nothing was running" in capsys.readouterr().out
    assert not server.PROCESSES.exists()
