"""A rank killed by SIGKILL at any moment, even while it writes a checkpoint: the same command resumes exactly."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from magicdrive_core.data.buckets import BucketSampler
from tests.training.gloo_ranks import RankError, run_distributed
from tests.training.test_loop import assert_equal_ends, job, losses, train_once

# What Python reports of a process's dealings with files (sys.audit): a rank may die right before any of them.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
SETTINGS: dict[str, Any] = {"checkpoint_every": 2, "keep_checkpoints": 2}


def count_events(folder: Path) -> int:
    """Train; return how many such events there were on this rank."""
    seen: list[str] = []
    with watched(folder, seen.append):
        train_once(folder)
    return len(seen)


def train_to_event(folder: Path, rank: int, number: int) -> None:
    """Train; ``rank`` kills itself before the event of that number."""
    seen: list[str] = []

    def note(event: str) -> None:
        if len(seen) == number and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)

    with watched(folder, note):
        train_once(folder)


@contextmanager
def watched(folder: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Call ``note`` at each event in a folder. Python keeps such a hook for good; afterwards it does nothing."""
    prefix, on = str(folder), [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if on and event in EVENTS and arguments and str(arguments[0]).startswith(prefix):
            note(event)

    sys.addaudithook(hook)
    yield
    on.clear()


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[int]]:
    """Return a precision, an uninterrupted run, and the number of its events on each rank."""
    folder = tmp_path_factory.mktemp(f"whole-{request.param}")
    job(folder, precision=request.param, **SETTINGS)
    return request.param, folder, run_distributed(count_events, 2, folder)


@pytest.mark.parametrize("seed", range(2))
def test_a_rank_killed_at_any_moment_resumes_exactly(
    run: tuple[str, Path, list[int]], tmp_path: Path, seed: int
) -> None:
    """Kill a rank twice, at moments drawn by the seed; then finish the run on two ranks, and a copy of it on one."""
    precision, whole, events = run
    draw = random.Random(f"{precision}-{seed}")
    job(tmp_path, precision=precision, **SETTINGS)
    rank = draw.randrange(2)
    with pytest.raises(RankError):
        run_distributed(train_to_event, 2, tmp_path, rank, draw.randrange(events[rank]))
    rank = draw.randrange(2)
    with suppress(RankError):  # where so much is left to do
        run_distributed(train_to_event, 2, tmp_path, rank, draw.randrange(events[rank] // 2))
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    shutil.copytree(tmp_path, tmp_path / "single", ignore=shutil.ignore_patterns("order.jsonl", "single"))
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)
    job(tmp_path / "single", precision=precision, **SETTINGS)
    assert run_distributed(train_once, 1, tmp_path / "single") == [0]
    assert all(loss == loss for loss in losses(tmp_path / "single"))
    resumed = int(saved[-1].removeprefix("step-")) if saved else 0
    used = [json.loads(line) for line in (tmp_path / "single/order.jsonl").read_text().splitlines()]
    stream = BucketSampler([7, 5], [2, 1], 1, 0, 3).stream(2 * resumed)
    assert used == [[2 * resumed + index, *next(stream)] for index in range(8 - resumed)]
    weights = load_file(tmp_path / "single/ema.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
