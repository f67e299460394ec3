"""The record of a step: sums over the ranks, names in MLflow, means between two entries."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Bucket
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.training.checkpoints import TrainingProgress
from magicdrive_core.training.engine import GradientCheck
from magicdrive_core.training.recorder import Recorder, StepStatistics, host_memory, peak_tflops
from magicdrive_core.training.statistics import (
    DeviceMemory,
    MicroBatchStatistics,
    RankStatistics,
    merge_groups,
)

BUCKETS = [Bucket(resolution="16x16", frames=1, batch=2), Bucket(resolution="16x16", frames=9, batch=1)]
PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"


def statistics(
    loss: float, bucket: int, noise: list[tuple[int, float]], memory: DeviceMemory | None = None
) -> RankStatistics:
    return RankStatistics(
        micro_batches=[MicroBatchStatistics(loss, noise, bucket, clips=len(noise), tokens=100, flops=3e12)],
        gradients=GradientCheck([], True, 1.0),
        waited=0.25 * (bucket + 1),
        stop=False,
        write_status=0,
        memory=memory,
    )


def step(number: int, *ranks: RankStatistics, skipped: list[str] | None = None) -> StepStatistics:
    groups = merge_groups(ranks, 1)
    norm = None if skipped else 0.5
    return StepStatistics.of(groups, TrainingProgress(step=number), 2.0, 1e-3, norm, None, BUCKETS, skipped or [])


TWO = (
    statistics(1.0, 0, [(0, 0.5), (9, 1.5)], DeviceMemory(10, 20, 50)),
    statistics(3.0, 1, [(9, 3.0)], DeviceMemory(15, 18, 40)),
)


def test_a_step_is_summed_up_by_bucket_and_noise_level() -> None:
    values = step(1, *TWO).metrics()
    assert values["loss"] == 2.0
    assert values["loss/16x16-1"] == 1.0
    assert values["loss/16x16-9"] == 3.0
    assert values["loss_at_noise/000-100"] == 0.5
    assert values["loss_at_noise/900-1000"] == 2.25
    assert values["clips_per_second"] == 1.5
    assert values["tokens_per_second"] == 100
    assert values["model_tflops"] == 3.0
    assert values["loader_wait_seconds"] == 0.5
    assert values["device_memory/allocated_gb"] == 15e-9
    assert values["device_memory/reserved_gb"] == 20e-9
    assert values["device_memory/used_gb"] == 50e-9


def test_a_skipped_step_has_no_loss() -> None:
    values = step(1, *TWO, skipped=["the loss of rank 1 is nan"]).metrics()
    assert values["skipped_steps"] == 1
    assert not [name for name in values if name.startswith(("loss/", "loss_at", "grad_norm"))]
    assert "loss" not in values


def test_mlflow_gets_the_means_between_two_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    config = load_config(PROFILE, ["training.log_every=2", "training.peak_tflops=10", "training.stage1.steps=9"])
    plan = StagePlan("stage1", tmp_path, "f" * 64, {}, None)
    log = mock.Mock()
    with Recorder(config, plan, TrainingProgress(), tmp_path, torch.device("cpu")) as recorder:
        recorder._log = log
        recorder.record(step(1, TWO[0]))
        recorder.record(step(2, TWO[1]))
        recorder.record(step(3, TWO[0], skipped=["the loss of rank 0 is nan"]))
    ((values, number), _) = log.metrics.call_args
    assert number == 2
    assert values["loss"] == 2.0
    assert values["loss/16x16-1"] == 1.0
    assert values["model_flops_utilisation"] == pytest.approx(1.5 / 20)
    assert values["host_memory/rss_gb"] > 0.01
    assert values["host_memory/container_gb"] >= values["host_memory/pss_gb"] * 0.5
    assert recorder.losses == [1.0, 3.0]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left"), KeyError("vae")]
)
@pytest.mark.parametrize("where", ["sample", "write"])
def test_a_preview_that_fails_costs_the_preview_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, error: Exception
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    plan = StagePlan("stage1", tmp_path, "f" * 64, {}, None)
    drawn: Any = mock.Mock(**{f"{where}.side_effect": error})
    with Recorder(load_config(PROFILE), plan, TrainingProgress(), tmp_path, torch.device("cpu")) as recorder:
        recorder.draw_preview(drawn, mock.Mock(), 7, mock.Mock())
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("no preview of step 7: ")
    assert line.endswith("; training continues")


def test_host_memory_is_that_of_this_process() -> None:
    before = host_memory()
    with mmap.mmap(-1, 256 << 20) as taken:  # pages of its own: the heap may give a tensor what it had got before
        taken[:: mmap.PAGESIZE] = b"1" * (len(taken) // mmap.PAGESIZE)
        after = host_memory()
    assert after["rss"] - before["rss"] == pytest.approx(256 << 20, rel=0.1)
    assert 0 < after["pss"] <= after["rss"]


@pytest.mark.parametrize(
    ("name", "precision", "configured", "peak"),
    [
        ("NVIDIA H200", "bf16", None, 989.0),
        ("NVIDIA H20", "bf16", None, 148.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", None, 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", None, None),
        ("something new", "bf16", None, None),
        ("something new", "bf16", 400.0, 400.0),
    ],
)
def test_the_peak_is_known_or_configured(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, configured: float | None, peak: float | None
) -> None:
    module: Any = mock.Mock(get_device_name=lambda _: name)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert peak_tflops(torch.device("cuda"), precision, configured) == peak
    assert peak_tflops(torch.device("cpu"), precision, None) is None
