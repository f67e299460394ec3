"""No item is made twice, and none is lost with the worker that had it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from magicdrive_core.inference.locks import item_lock

WORKER = """
import sys, time
from pathlib import Path
from magicdrive_core.inference.locks import item_lock
out = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for n in range(40):
    with item_lock(out, f"item{n}") as mine:
        done = out / f"item{n}"
        if mine and not done.exists():
            time.sleep(0.002)
            with (out / "log").open("a") as log:
                log.write(f"{n}\\n")
            done.mkdir()
"""
HOLDER = """
import sys, time
from pathlib import Path
from magicdrive_core.inference.locks import item_lock
with item_lock(Path(sys.argv[1]), "item") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def start(code: str, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_workers_share_the_items(tmp_path: Path) -> None:
    workers = [start(WORKER, tmp_path) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n", timeout=60)
        assert worker.returncode == 0
    made = (tmp_path / "log").read_text().split()
    assert sorted(made, key=int) == [str(n) for n in range(40)]


def test_the_lock_of_a_killed_worker_is_free(tmp_path: Path) -> None:
    holder = start(HOLDER, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with item_lock(tmp_path, "item") as mine:
        assert not mine
    with item_lock(tmp_path, "other") as mine:
        assert mine
    assert (tmp_path / ".locks/item.lock").read_text().startswith(f"pid {holder.pid} on ")
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate(timeout=30)
    with item_lock(tmp_path, "item") as mine:
        assert mine
    assert (tmp_path / ".locks/item.lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        try:
            with item_lock(tmp_path, "item") as mine:
                assert mine
                raise RuntimeError
        except RuntimeError:
            pass
