"""One worker an item, among any number of workers and hosts that share a folder.

A claim is a file that is created exclusively, which every file system does for one process only; no lock of the system
is asked for, because shared file systems keep those badly or not at all. Its owner touches it as long as it works, so
that the claim of a dead host can be told by its age; that of a dead process of this host is told at once. The files of
an item are numbered: a claim that is given back or dead stays, and the next one is the file after it. So no file is
ever removed or taken over, and of all who see the same dead claim one alone creates the next.

A worker that is stopped for longer than ``EXPIRY`` can lose its claim without noticing: see ``Claim.holds``.
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
BEAT = 10.0  # seconds between two touches
EXPIRY = 180.0  # seconds without a touch; network file systems may show times a minute late
CLOCK_SLACK = 3.0  # seconds by which the start of a process may be told differently


class Claim:
    """One item that this process has."""

    def __init__(self, path: Path, successor: Path) -> None:
        self.path = path
        self._successor = successor

    @property
    def holds(self) -> bool:
        """Whether nobody took this worker for dead: to be asked before a result is put in place."""
        return not self._successor.exists()

    def touch(self) -> None:
        """Shows that the owner lives."""
        with suppress(FileNotFoundError):  # the folder was removed: whoever did that wants no claims
            os.utime(self.path)

    def give_back(self) -> None:
        """Lets others claim the item; the file says no more than that."""
        with suppress(FileNotFoundError):
            self.path.write_text(json.dumps({"given_back": True}))


class Claims:
    """The items that this process has. Leaving the context gives all of them back.

    Args:
        out: the shared folder of the items' folders.
        beat, expiry: see ``BEAT`` and ``EXPIRY``; the same for all workers.
    """

    def __init__(self, out: Path, *, beat: float = BEAT, expiry: float = EXPIRY) -> None:
        self._folder = out / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat, self._expiry = beat, expiry
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
            self.give_back(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> Claim | None:
        """Claims an item; None: another worker has it. Does not wait."""
        for number in count():
            path, successor = (self._folder / f"{name}.{n}" for n in (number, number + 1))
            try:
                with path.open("x") as file:
                    file.write(self._owner)
            except FileExistsError:
                if successor.exists() or self._is_over(path):
                    continue
                return None
            claim = Claim(path, successor)
            with self._changing:
                self._held[name] = claim
            return claim
        raise AssertionError("unreachable")

    def give_back(self, name: str) -> None:
        """Ends a claim, whatever became of the item, unless it ended before."""
        with self._changing:
            claim = self._held.pop(name, None)
        if claim is not None:
            claim.give_back()

    def _is_over(self, path: Path) -> bool:
        """Whether a claim was given back, or its owner is dead."""
        with path.open() as file:  # opening asks the server of a network file system for the present times
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
        try:
            owner: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            owner = {}  # being written
        return "given_back" in owner or _is_dead(owner) or self._now() - touched > self._expiry

    def _now(self) -> float:
        """The file system's own clock, by which files were touched: those of hosts differ."""
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._beat):
            with self._changing:
                held = list(self._held.values())
            for claim in held:
                claim.touch()


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "room": _room(), "pid": pid, "started": psutil.Process(pid).create_time()}


def _room() -> str:
    """Where process ids mean what they mean here: this start of this machine, this container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner is known to be gone; of other hosts and containers nothing is known."""
    if owner.get("room") != _room():
        return False
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > CLOCK_SLACK)
    except psutil.NoSuchProcess:
        return True
