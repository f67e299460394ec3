"""Claims: at most one worker makes an item, among any number of workers and hosts that share a folder.

A claim is a file that is created exclusively, which every file system does for one process only. Locks of the operating
system are not used, because shared file systems support them badly or not at all. The owner touches its file while it
works: a claim of a dead process on this host is free at once, one of another host when it is old. The files of an item
are numbered: a released or dead claim stays, and the next claim is the file with the next number. So no file is ever
removed or taken over, and of all workers that see the same dead claim only one creates the next.

A worker that is stopped for longer than ``EXPIRY`` can lose its claim without noticing: see ``Claim.is_held``.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

FOLDER = ".claims"
HEARTBEAT = 10.0  # seconds between two touches
EXPIRY = 180.0  # seconds without a touch; network file systems may show times that are a minute late
CLOCK_SLACK = 3.0  # seconds by which two readings of a process's start time may differ


class Claim:
    """The claim of this process on one item.

    Args:
        path: file of the claim.
        successor: file that another worker creates if it takes this claim for dead.
    """

    def __init__(self, path: Path, successor: Path) -> None:
        self.path = path
        self._successor = successor

    @property
    def is_held(self) -> bool:
        """Whether no other worker took this one for dead; asked before a result replaces the item's folder."""
        return not self._successor.exists()

    def touch(self) -> None:
        """Shows that the owner is alive."""
        with suppress(FileNotFoundError):  # the folder was removed: whoever did that wants no claims
            os.utime(self.path)

    def release(self) -> None:
        """Lets other workers claim the item, whether it was made or not."""
        with suppress(FileNotFoundError):
            try:
                self.path.write_text(json.dumps({"released": True}))
            except OSError:  # the disk is full: an old claim is as good as a released one
                os.utime(self.path, (0, 0))


class Claims:
    """All claims of this process; leaving the context releases them.

    Args:
        out: shared folder of the items' folders.
        heartbeat: seconds between two touches of a held claim.
        expiry: seconds without a touch after which a claim of another host is dead; the same for all workers.
    """

    def __init__(self, out: Path, *, heartbeat: float = HEARTBEAT, expiry: float = EXPIRY) -> None:
        self._folder = out / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._heartbeat, self._expiry = heartbeat, expiry
        self._owner = json.dumps(_this_process())
        self._clock = self._folder / f".clock-{uuid4().hex}"
        self._held: dict[str, Claim] = {}
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> Claim | None:
        """Claims an item without waiting.

        Args:
            name: the item's name.

        Returns:
            The claim, which is touched regularly from now on; None if another worker holds one.
        """
        for number in count():
            path, successor = (self._folder / f"{name}.{n}" for n in (number, number + 1))
            try:
                _write_new(path, self._owner)
            except FileExistsError:
                if successor.exists() or self._is_free(path):
                    continue
                return None
            claim = Claim(path, successor)
            with self._changing:
                self._held[name] = claim
            return claim
        raise AssertionError("unreachable")

    def release(self, name: str) -> None:
        """Releases a claim, unless it was released before or never taken; any thread may call this.

        Args:
            name: the item's name.
        """
        with self._changing:
            claim = self._held.pop(name, None)
        if claim is not None:
            claim.release()

    def _is_free(self, path: Path) -> bool:
        """Whether a claim was released, or its owner is dead."""
        with path.open() as file:  # opening asks the server of a network file system for the current times
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
        try:
            owner: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            owner = {}  # being written
        return "released" in owner or _is_dead(owner) or self._now() - touched > self._expiry

    def _now(self) -> float:
        """Time of the file system's own clock, which dates the touches; the clocks of hosts differ."""
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._heartbeat):
            with self._changing:
                held = list(self._held.values())
            for claim in held:
                claim.touch()


def _write_new(path: Path, text: str) -> None:
    """Writes a file that must not exist; on a full disk none is left, which would be taken for a claim."""
    with path.open("x") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid_namespace": _pid_namespace(),
        "pid": pid,
        "started": psutil.Process(pid).create_time(),
    }


def _pid_namespace() -> str:
    """Identifies where process ids mean what they mean here: this boot of this machine, this container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner is known to have ended; nothing is known about other hosts and containers."""
    if owner.get("pid_namespace") != _pid_namespace():
        return False
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > CLOCK_SLACK)
    except psutil.NoSuchProcess:
        return True
