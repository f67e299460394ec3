"""Generation under faults: workers are killed, results damaged, folders read-only; the bytes are those of a calm run.

The workers are processes that share items through real claims; writing a grey picture takes the place of the network.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from magicdrive_core.inference.fan_out import Summary
from magicdrive_core.inference.items import is_done
from magicdrive_core.utils.files import sha256_folder
from magicdrive_core.video.item_record import RECORD
from tests.conftest import PROJECT
from tests.drills.conftest import Drill
from tests.inference.workers import items, work

WORKERS = 2

Harm = Callable[[Path, random.Random], None]


def start(out: Path, count: int, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.inference.workers", str(out), str(count), "0.01", str(number), str(WORKERS)]
    return subprocess.Popen(command, cwd=PROJECT)


def digests(out: Path, count: int) -> dict[str, str]:
    return {item.name: sha256_folder(out / item.name) for item in items(count)}


@pytest.fixture
def calm(tmp_path: Path) -> Callable[[int], Path]:
    """Make the results of a run that nothing disturbed."""

    def make(count: int) -> Path:
        out = tmp_path / "calm"
        out.mkdir()
        work(out, count, 0.0)
        return out

    return make


def cut_short(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def zero(path: Path, _: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_a_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


HARMS = [cut_short, flip, remove, zero, replace_by_a_folder]


def harmful(harm: Harm, path: Path) -> bool:
    """Tell whether a harm shows: another letter in the caption of a record is no fault that anything compares."""
    return not (harm is flip and path.name == RECORD)


def damage(out: Path, names: list[str], rng: random.Random) -> None:
    """Damage one file of a finished item, if there is one."""
    files = sorted(path for name in names for path in out.glob(f"{name}/*") if path.is_file())
    chances = [(harm, path) for path in files for harm in HARMS if harmful(harm, path)]
    if chances:
        harm, path = rng.choice(chances)
        harm(path, rng)


def test_every_damage_to_a_finished_item_is_found_and_mended(
    drill: Drill, calm: Callable[[int], Path], tmp_path: Path
) -> None:
    """Generation: every kind of damage to every file of an item is found, and the item made again."""
    whole = calm(1)
    out, (item,) = tmp_path / "out", items(1)
    out.mkdir()
    work(out, 1, 0.0)
    rng = random.Random(5)
    for harm in HARMS:
        for name in sorted(path.name for path in (whole / item.name).iterdir()):
            if not harmful(harm, Path(name)):
                continue
            harm(out / item.name / name, rng)
            drill.faults += 1
            assert not is_done(out / item.name, item.name)
            work(out, 1, 0.0)
            assert is_done(out / item.name, item.name)
            drill.compare((out / item.name / name).is_file(), True)
    (out / item.name / RECORD).unlink()
    work(out, 1, 0.0)
    drill.compare(digests(out, 1), digests(whole, 1))


def disturbed(drill: Drill, out: Path, count: int, faults: int, seed: int) -> None:
    """Generate while workers are killed, finished items damaged and the folder made read-only."""
    rng, names = random.Random(seed), [item.name for item in items(count)]
    workers = [start(out, count, number) for number in range(WORKERS)]
    try:
        for _ in range(faults):
            time.sleep(rng.uniform(0.0, 0.4))
            kind = rng.choice(["kill", "kill", "damage"])
            if kind == "damage":
                damage(out, names, rng)
            else:
                victim = rng.randrange(WORKERS)
                workers[victim].kill()
                workers[victim].wait()
                workers[victim] = start(out, count, victim)
            drill.faults += 1
        for worker in workers:
            worker.wait(300)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def settle(out: Path, count: int) -> Summary:
    """Run a last undisturbed worker, as a user would after the faults."""
    return work(out, count, 0.0)


def check(drill: Drill, out: Path, whole: Path, count: int) -> None:
    for name, digest in digests(whole, count).items():
        drill.compare(sha256_folder(out / name), digest)
    left = {path.name for path in out.iterdir() if path.is_dir()} - {".claims", ".checked"}
    drill.compare(left, {item.name for item in items(count)})  # no partial folder


def test_killed_workers_and_damaged_items_cost_no_byte(
    drill: Drill, calm: Callable[[int], Path], tmp_path: Path
) -> None:
    out, count = tmp_path / "out", 12
    out.mkdir()
    disturbed(drill, out, count, 3, seed=1)
    settle(out, count)
    check(drill, out, calm(count), count)


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_a_hundred_kills_and_damages(drill: Drill, calm: Callable[[int], Path], tmp_path: Path) -> None:
    """Generation: workers killed at random moments, finished items damaged meanwhile."""
    out, count = tmp_path / "out", drill.scaled(300)
    out.mkdir()
    disturbed(drill, out, count, drill.scaled(100), seed=2)
    settle(out, count)
    check(drill, out, calm(count), count)
