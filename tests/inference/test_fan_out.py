"""Items shared by workers that come and go: all are made, none twice, and failures are retried and reported."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.claims import Claim, Claims
from magicdrive_core.inference.fan_out import share_items
from magicdrive_core.inference.items import Item
from magicdrive_core.utils.files import sha256_folder
from tests.conftest import PROJECT
from tests.inference.workers import finished, items, work, write


def start(out: Path, count: int, seconds: float, shard: int, shards: int) -> subprocess.Popen[bytes]:
    words = [str(out), str(count), str(seconds), str(shard), str(shards)]
    return subprocess.Popen([sys.executable, "-m", "tests.inference.workers", *words], cwd=PROJECT)


def digests(out: Path, count: int) -> dict[str, str]:
    return {item.name: sha256_folder(out / item.name) for item in items(count)}


def test_several_workers_make_every_item_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, 30, 0.005, n, 3) for n in range(3)]
    assert [worker.wait(200) for worker in workers] == [0, 0, 0]
    assert sorted((tmp_path / "started").read_text().split()) == sorted(item.name for item in items(30))
    assert work(tmp_path, 30, 0.0).skipped == [item.name for item in items(30)]


def test_workers_killed_at_random_leave_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    count, rng = 40, random.Random(3)
    out, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (out, whole):
        folder.mkdir()
    work(whole, count, 0.0)
    workers = [start(out, count, 0.02, n, 2) for n in range(2)]
    for _ in range(5):
        before = lines(out)
        deadline = time.monotonic() + 200
        while lines(out) < min(count, before + rng.randint(2, 6)) and time.monotonic() < deadline:
            time.sleep(rng.uniform(0, 0.02))
        victim = rng.randrange(2)
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = start(out, count, 0.02, victim, 2)
    assert [worker.wait(200) for worker in workers] == [0, 0]
    assert digests(out, count) == digests(whole, count)
    folders = {path.name for path in out.iterdir() if path.is_dir()} - {".claims", ".checked"}
    assert folders == {item.name for item in items(count)}
    again = Counter((out / "started").read_text().split())
    assert sum(again.values()) - count <= 5  # at most the items that the killed workers had started


def lines(out: Path) -> int:
    log = out / "started"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_worker_waits_for_an_item_that_another_one_has_claimed(tmp_path: Path) -> None:
    first, second = items(2)
    with Claims(tmp_path) as other:
        assert other.take(first.name)

        def wait(_: float) -> None:
            write(tmp_path, first)
            other.release(first.name)

        def make(item: Item, _: Claim) -> Future[None]:
            assert item == second
            write(tmp_path, item)
            return finished()

        summary = share_items([first, second], tmp_path, lambda item: item.name, make, wait=wait)
    assert (summary.made, summary.skipped) == ([second.name], [first.name])


def test_an_item_is_retried_after_one_failure_and_reported_after_two(tmp_path: Path) -> None:
    flaky, broken, well = items(3)
    tries: Counter[str] = Counter()

    def make(item: Item, _: Claim) -> Future[None]:
        tries[item.name] += 1
        if item == broken or (item == flaky and tries[item.name] == 1):
            raise MagicDriveError("disk full")
        write(tmp_path, item)
        return finished()

    with pytest.raises(MagicDriveError, match=rf"1 of 3 items failed, each 2 times. {broken.name}: disk full"):
        share_items([flaky, broken, well], tmp_path, lambda item: item.name, make, wait=lambda _: None)
    assert tries == {flaky.name: 2, broken.name: 2, well.name: 1}
    assert (tmp_path / flaky.name).is_dir()
