"""Disks that are full, or read-only for a while: a line names the disk, nothing half is left, and it goes on later."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.claims import Claims
from magicdrive_core.utils.files import (
    atomic_file,
    atomic_folder,
    resumable_folder,
    sha256_folder,
    write_json,
    write_unsynced,
)
from tests.drills.conftest import Drill, fill
from tests.inference.workers import items, work
from tests.training.gloo_ranks import RankError, run_distributed
from tests.training.test_loop import assert_equal_ends, job, losses, train_once, whole

__all__ = ["whole"]

DATA = bytes(range(256)) * 40


def in_a_folder(path: Path) -> None:
    with atomic_folder(path) as partial:
        (partial / "first").write_bytes(DATA)
        (partial / "second").write_bytes(DATA)


def resumed(path: Path) -> None:
    with resumable_folder(path, "k" * 64) as partial, atomic_file(partial / "first") as file:
        file.write_bytes(DATA)


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"numbers": list(range(3000))}),
    "unsynced": lambda path: write_unsynced(path, DATA),
    "folder": in_a_folder,
    "resumable": resumed,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_content_and_nothing_half(drill: Drill, small_disk: Path, name: str) -> None:
    write, path = WRITERS[name], small_disk / "result"
    write(path)
    before = content(path)
    for free in (0, 4096, 12288):
        ballast = fill(small_disk, free)
        drill.faults += 1
        outcome = "written"
        try:
            write(path)
        except MagicDriveError as error:
            outcome = str(error).partition(" of ")[0]
        assert outcome in {"written", "no space left on the disk"}
        drill.compare(content(path), before)
        ballast.unlink()
        left = {each.name for each in small_disk.iterdir() if "partial" in each.name}
        drill.compare(left, set())
        write(path)
        drill.compare(content(path), before)


def content(path: Path) -> Any:
    return {each.name: each.read_bytes() for each in path.iterdir()} if path.is_dir() else path.read_bytes()


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_generation_stops_with_a_line_and_goes_on_when_the_disk_is_back(
    drill: Drill, small_disk: Path, tmp_path: Path, state: str
) -> None:
    count, calm = 6, tmp_path / "calm"
    calm.mkdir()
    work(calm, count, 0.0)
    work(small_disk, 2, 0.0)
    ballast = fill(small_disk, 20_000) if state == "full" else None
    if state == "read-only":
        remount(small_disk, "ro")
    drill.faults += 1
    with pytest.raises((MagicDriveError, OSError)) as stopped:  # either becomes one line of the command
        work(small_disk, count, 0.0)
    assert re.search(r"no space left|cannot be written|Read-only|No space left", str(stopped.value))
    remount(small_disk, "rw")
    if ballast:
        ballast.unlink()
    work(small_disk, count, 0.0)
    for item in items(count):
        drill.compare(sha256_folder(small_disk / item.name), sha256_folder(calm / item.name))
    assert not list(small_disk.glob("*.partial"))


def test_a_full_disk_leaves_no_claim_behind(drill: Drill, small_disk: Path) -> None:
    """Neither one that was half made, nor one that was released; nobody would make these items for minutes."""
    with Claims(small_disk) as claims, Claims(small_disk) as other:
        assert claims.take("first")
        ballast = fill(small_disk)
        drill.faults += 1
        claims.release("first")
        with pytest.raises(OSError, match="No space left"):
            claims.take("second")
        ballast.unlink()
        drill.compare([other.take(name) is not None for name in ("first", "second")], [True, True])


def train_while_the_disk_is_full(folder: Path, disk: Path, full: set[int]) -> int:
    """Train; rank 0 fills the disk before some steps and frees it before the others."""
    import torch.distributed as dist

    from tests.training.tiny_rank import MadeUpLoader

    following = MadeUpLoader.next

    def next_batch(loader: MadeUpLoader) -> Any:
        if dist.get_rank() == 0:
            if loader._index // loader._groups in full:
                fill(disk)
            else:
                (disk / "ballast").unlink(missing_ok=True)
        return following(loader)

    with mock.patch.object(MadeUpLoader, "next", next_batch):
        return train_once(folder)


@pytest.mark.parametrize("full", [{2}, {3, 4}, {5, 6, 7}], ids=str)
def test_a_training_on_a_full_disk_ends_as_if_it_never_was(
    drill: Drill, whole: Path, small_disk: Path, full: set[int]
) -> None:
    folder = small_disk / "run"
    folder.mkdir()
    job(folder)
    drill.faults += len(full)
    stopped = ""
    try:
        run_distributed(train_while_the_disk_is_full, 2, folder, small_disk, full)
    except RankError as error:
        stopped = str(error)
    assert not stopped or "no space left on the disk of" in stopped
    if stopped:
        (small_disk / "ballast").unlink()
        run_distributed(train_once, 2, folder)
    assert_equal_ends(folder, whole)
    drill.compared += len(losses(folder)) + 1
