"""fp16's loss scale: lowered where gradients overflow, raised after good steps, and kept when a run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from magicdrive_core.utils.files import read_json
from tests.training.gloo_ranks import run_distributed
from tests.training.test_guard import train_in_trouble
from tests.training.test_loop import job, train_once


def train_with_quick_growth(folder: Path) -> int:
    """Train with a scale that doubles after two good steps; above 2^16 the output's gradients overflow."""
    from magicdrive_core.training import engine as loss_scale

    with mock.patch.object(loss_scale, "GROWTH_INTERVAL", 2):
        return train_once(folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16")
    job(folder, precision="fp16", checkpoint_every=1, keep_checkpoints=8, max_skipped=1)
    assert run_distributed(train_with_quick_growth, 2, folder) == [0, 0]
    return folder


def test_an_overflow_lowers_the_scale_and_counts_as_no_fault(whole: Path) -> None:
    steps = lines(whole)
    overflows = [step["step"] for step in steps if step["skipped"]]
    assert overflows
    assert all(
        fault.startswith(f"the loss scale {step['loss_scale']:g} is too large: the gradient of ")
        for step in steps
        for fault in step["skipped"]
    )
    scale, good = 2.0**16, 0
    for step in steps:
        assert step["loss_scale"] == scale
        good = 0 if step["skipped"] else good + 1
        if step["skipped"]:
            scale /= 2
        elif good == 2:
            scale, good = 2 * scale, 0
    assert all(step["grad_norm"] < 100 for step in steps if not step["skipped"])
    assert all(tensor.isfinite().all() for tensor in load_file(whole / "ema.safetensors").values())


def test_a_resumed_run_continues_with_the_loss_scale_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """It resumes between two growths, where the counter of good steps matters."""
    middle = next(
        path
        for path in sorted((whole / "checkpoints").iterdir())[1:]
        if read_json(path / "state.json")["loss_scale"]["good"] == 1
    )
    shutil.copytree(middle, tmp_path / "checkpoints" / middle.name)
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    job(tmp_path, precision="fp16", checkpoint_every=1, keep_checkpoints=8, max_skipped=1)
    assert run_distributed(train_with_quick_growth, 2, tmp_path) == [0, 0]
    for own, expected in zip(lines(tmp_path), lines(whole), strict=True):
        assert (own["loss"], own["loss_scale"], own["grad_norm"]) == (
            expected["loss"],
            expected["loss_scale"],
            expected["grad_norm"],
        )
    weights, expected = load_file(tmp_path / "ema.safetensors"), load_file(whole / "ema.safetensors")
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_a_loss_that_is_not_finite_is_a_fault_whatever_the_scale(tmp_path: Path) -> None:
    job(tmp_path, precision="fp16", max_skipped=1)
    (message, _) = run_distributed(train_in_trouble, 2, tmp_path, "nan-1-5")
    assert "no finite loss and gradient from step 5 to 5" in message
    assert "the loss of rank 1 is nan" in message
