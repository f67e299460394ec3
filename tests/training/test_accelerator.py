"""What a device would find: tensors left on the CPU, waits of the host, and how much a peak of memory says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def on_a_device() -> dict[str, Any]:
    """Run a training step and two generations on a device without numbers, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.fake_accelerator"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_training_step_leaves_nothing_on_the_cpu_and_waits_for_the_device_once(on_a_device: dict[str, Any]) -> None:
    """With two micro-batches, the update, the averages, and the averages in the network for a preview."""
    assert on_a_device["training"] == {"device": "fakegpu:0", "reads": 1}


@pytest.mark.parametrize("network", ["own", "published"])
def test_a_generation_leaves_nothing_on_the_cpu_and_no_pass_waits(on_a_device: dict[str, Any], network: str) -> None:
    """It reads height and width of the video once, whatever the number of steps."""
    found = on_a_device[f"{network} generation"]
    assert found == {"device": "fakegpu:0", "shape": [1, 6, 3, 3, 4, 6], "reads": 2}


def test_fp32_is_fp32_and_no_kernel_is_chosen_by_trying() -> None:
    import magicdrive_core.device  # noqa: F401 - decides

    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


def test_a_peak_of_memory_counts_from_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from magicdrive_core.training.statistics import DeviceMemory, device_memory

    reset = mock.Mock()
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (30, 100))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: 50)
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda _: 60)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", reset)
    assert device_memory(torch.device("cuda:1")) == DeviceMemory(50, 60, 70)
    reset.assert_called_once_with(torch.device("cuda:1"))
