"""One worker an item, among any number of workers that share a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def item_lock(out: Path, name: str) -> Iterator[bool]:
    """Yields whether this process has the item; does not wait for one that another process holds.

    The system releases the lock of a process that died, so that no lock is ever stale. The file itself stays, and says
    who held it last.
    """
    owner = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
    path = out / ".locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, on_acquired=lambda descriptor: _sign(descriptor, owner))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _sign(descriptor: int, owner: bytes) -> None:
    os.truncate(descriptor, 0)
    os.write(descriptor, owner)
