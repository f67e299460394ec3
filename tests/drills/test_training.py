"""Training under faults ends with the weights and metrics of a calm run, bit for bit.

Launcher, elastic agent, ranks, loop, engine and checkpoints are the real ones; the network is tiny. Kills of one rank
at every dealing with a file, in the suite: tests/training/test_killed.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import PROJECT
from tests.drills.conftest import Drill
from tests.drills.test_generation import HARMS
from tests.training.networks import stage
from tests.training.test_loop import assert_equal_ends, job

STEPS = 150
SETTINGS = {"stage1": stage(steps=STEPS), "checkpoint_every": 10, "keep_checkpoints": 3}
MANIFESTS = ["", "{}", "[]", "null", '{"state.json": 1}']


def start(folder: Path, clock: float = 0.0) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DRILL_CLOCK": str(clock)}
    with (folder / "launcher.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.drills.tiny_training", str(folder)],
            cwd=PROJECT,
            env=environment,
            stdout=log,
            stderr=log,
        )


def family(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the launcher, the agent and the ranks that live."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher.pid)
        return [process, *process.children(recursive=True)]
    return []


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs([each for each in processes if each.is_running()], timeout=90)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], "processes outlive their launcher"


def kill_one(members: list[psutil.Process], rng: random.Random) -> None:
    """Kill the launcher, the agent or a rank outright."""
    rng.choice(members).kill()


def storm(members: list[psutil.Process], rng: random.Random) -> None:
    """Send SIGTERM many times to many of them, as an impatient scheduler does."""
    for _ in range(rng.randrange(3, 20)):
        with suppress(psutil.NoSuchProcess):
            rng.choice(members).send_signal(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.05))


def suspend(members: list[psutil.Process], rng: random.Random) -> None:
    """Suspend one of them for a while, as a host under memory pressure does."""
    victim = rng.choice(members)
    victim.suspend()
    time.sleep(rng.uniform(0.5, 3))
    victim.resume()


FAULTS = [kill_one, kill_one, kill_one, storm, suspend]


def damage_newest(folder: Path, rng: random.Random) -> bool:
    """Damage a file of the newest checkpoint; tells whether there was one."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    if not checkpoints:
        return False
    path = rng.choice(sorted(checkpoints[-1].iterdir()))
    if path.name == "manifest.json" and rng.random() < 0.5:
        path.write_text(rng.choice(MANIFESTS))
    else:
        rng.choice(HARMS)(path, rng)
    return True


@pytest.fixture
def calm(tmp_path: Path) -> Path:
    folder = tmp_path / "calm"
    folder.mkdir()
    job(folder, **SETTINGS)
    launcher = start(folder)
    assert launcher.wait(1800) == 0, (folder / "launcher.txt").read_text()[-2000:]
    return folder


@pytest.mark.drill
@pytest.mark.timeout(7200)
def test_kills_storms_clocks_and_damaged_checkpoints(drill: Drill, calm: Path, tmp_path: Path) -> None:
    """Training: launcher, agent and ranks killed, terminated, suspended; clocks moved; checkpoints damaged."""
    rng, folder = random.Random(7), tmp_path / "disturbed"
    folder.mkdir()
    job(folder, **SETTINGS)
    wanted = drill.scaled(50)
    while drill.faults < wanted:
        launcher = start(folder, clock=rng.choice([0.0, -4e7, 4e7, 3600.0]))
        members = family(launcher)
        seen = step_of(folder)
        if rng.random() < 0.7:  # at work; else during the start
            await_step(folder, seen + 1, launcher)
        time.sleep(rng.uniform(0, 1.5))
        for _ in range(rng.randrange(1, 3)):
            if members := family(launcher) or members:
                with suppress(psutil.NoSuchProcess):
                    rng.choice(FAULTS)(members, rng)
                drill.faults += 1
        if launcher.poll() is None and rng.random() < 0.5:
            launcher.kill()
            drill.faults += 1
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(rng.uniform(1, 20))
        members = family(launcher) or members
        launcher.terminate()
        launcher.wait(300)
        assert_gone(members)
        if rng.random() < 0.3:
            drill.faults += damage_newest(folder, rng)
        if (folder / "run.json").exists():  # finished in spite of all: check it, and begin again
            check(drill, folder, calm)
            folder = tmp_path / f"disturbed-{drill.faults}"
            folder.mkdir()
            job(folder, **SETTINGS)
    launcher = start(folder)
    assert launcher.wait(1800) == 0, (folder / "launcher.txt").read_text()[-2000:]
    check(drill, folder, calm)


def step_of(folder: Path) -> int:
    with suppress(OSError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def await_step(folder: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 600
    while step_of(folder) < step and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def check(drill: Drill, folder: Path, calm: Path) -> None:
    """Compare every weight and the loss of every step."""
    drill.lost += 1
    assert_equal_ends(folder, calm)
    drill.lost -= 1
    drill.compared += STEPS + 1
