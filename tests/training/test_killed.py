"""A rank killed by SIGKILL at any moment of a run, within its checkpoints too: the same command goes on as if not."""

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
    """Trains; returns how many such events there were on this rank."""
    seen: list[str] = []
    with watched(folder, seen.append):
        train_once(folder)
    return len(seen)


def train_to_event(folder: Path, rank: int, number: int) -> None:
    """Trains; ``rank`` kills itself before the event of that number."""
    seen: list[str] = []

    def note(event: str) -> None:
        if len(seen) == number and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)

    with watched(folder, note):
        train_once(folder)


@contextmanager
def watched(folder: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Calls ``note`` at each event in a folder. Python keeps such a hook for good: afterwards it does nothing."""
    prefix, on = str(folder), [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if on and event in EVENTS and arguments and str(arguments[0]).startswith(prefix):
            note(event)

    sys.addaudithook(hook)
    yield
    on.clear()


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[int]]:
    """A precision, a run that nothing interrupted, and its events on each rank."""
    folder = tmp_path_factory.mktemp(f"whole-{request.param}")
    job(folder, precision=request.param, **SETTINGS)
    return request.param, folder, run_distributed(count_events, 2, folder)


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_moment(run: tuple[str, Path, list[int]], tmp_path: Path, seed: int) -> None:
    """Two kills, one after the other, at places drawn by the seed; then the end on two ranks, or on one.

    benchmarks/results/training.md says how many seeds were tried when this was written.
    """
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
    shutil.copytree(tmp_path, tmp_path / "alone", ignore=shutil.ignore_patterns("order.jsonl", "alone"))
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)
    job(tmp_path / "alone", precision=precision, **SETTINGS)
    assert run_distributed(train_once, 1, tmp_path / "alone") == [0]
    assert all(loss == loss for loss in losses(tmp_path / "alone"))
    begun = int(saved[-1].removeprefix("step-")) if saved else 0
    asked = [json.loads(line) for line in (tmp_path / "alone/order.jsonl").read_text().splitlines()]
    stream = BucketSampler([7, 5], [2, 1], 1, 0, 3).stream(2 * begun)
    assert asked == [[2 * begun + place, *next(stream)] for place in range(8 - begun)]
    weights = load_file(tmp_path / "alone/ema.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
