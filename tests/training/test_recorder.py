"""The record of a step: sums over the ranks, names in MLflow, means between two entries."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Bucket
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.training.checkpoints import TrainingProgress
from magicdrive_core.training.delivery import GrowingHistory, named_values
from magicdrive_core.training.engine import GradientCheck
from magicdrive_core.training.metrics_file import MetricsFile, parse_lines, read_metrics
from magicdrive_core.training.recorder import Recorder, StepStatistics, host_memory, peak_tflops
from magicdrive_core.training.statistics import (
    DeviceMemory,
    MicroBatchStatistics,
    RankStatistics,
    merge_groups,
)
from tests.utils.test_files import files_of_at_most

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


def logged(statistics: StepStatistics) -> dict[str, float]:
    return dict(named_values(asdict(statistics)))


def test_a_step_is_summed_up_by_bucket_and_noise_level() -> None:
    values = logged(step(1, *TWO))
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
    values = logged(step(1, *TWO, skipped=["the loss of rank 1 is nan"]))
    assert values["skipped_steps"] == 1
    assert not [name for name in values if name.startswith(("loss/", "loss_at", "grad_norm"))]
    assert "loss" not in values


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Recorder]:
    """``recording(step)``: the recorder of rank 0 of two, which resumes after a step."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    config = load_config(PROFILE, ["training.log_every=2", "training.peak_tflops=10", "training.stage1.steps=9"])
    plan = StagePlan("stage1", tmp_path, "f" * 64, {}, None)
    return lambda done: Recorder(config, plan, TrainingProgress(step=done), torch.device("cpu"))


def test_entries_are_the_means_between_two_of_them(tmp_path: Path, recording: Callable[[int], Recorder]) -> None:
    with recording(0) as recorder:
        recorder.record(step(1, TWO[0]))
        recorder.record(step(2, TWO[1]))
        recorder.record(step(3, TWO[0], skipped=["the loss of rank 0 is nan"]))
    assert recorder.losses == [1.0, 3.0]
    history = GrowingHistory(tmp_path / "metrics.jsonl", log_every=2, steps=9)
    ((number, entry),) = history.entries().items()
    values = entry.values
    assert number == entry.step == 2
    assert abs(entry.time - time.time()) < 60
    assert values["loss"] == 2.0
    assert values["loss/16x16-1"] == 1.0
    assert values["skipped_steps"] == 0
    assert values["model_flops_utilisation"] == pytest.approx(1.5 / 20)
    assert values["host_memory/rss_gb"] > 0.01
    assert values["host_memory/container_gb"] >= values["host_memory/pss_gb"] * 0.5
    with recording(3) as recorder:
        recorder.record(step(4, TWO[0]))
    ((number, entry),) = history.entries().items()  # the file has grown
    assert (number, entry.values["skipped_steps"], entry.values["loss"]) == (4, 1, 1.0)
    with recording(1):
        assert history.entries() == {}  # it was replaced by a shorter one


def test_a_disk_that_is_full_for_a_while_costs_no_step_and_no_line(
    tmp_path: Path, recording: Callable[[int], Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on the size of files cuts a line in its middle, as a full disk does."""
    with recording(0) as recorder:
        recorder.record(step(1, TWO[0]))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with files_of_at_most(size + 50):
            for number in (2, 3, 4):
                recorder.record(step(number, TWO[0]))
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
        assert len(caplog.records) == 1
        assert "metrics.jsonl cannot be written: File too large; its lines wait in memory" in caplog.text
        recorder.record(step(5, TWO[0]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_progress_shows_on_a_full_disk_too(
    tmp_path: Path, recording: Callable[[int], Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends a group whose status.json stays unchanged."""
    monkeypatch.setattr("magicdrive_core.training.recorder.HEARTBEAT_SECONDS", 0.0)
    with recording(0) as recorder:
        recorder.record(step(1, TWO[0]))
        before = (tmp_path / "status.json").read_text()
        os.utime(tmp_path / "status.json", (1, 1))
        with files_of_at_most(10):
            recorder.record(step(2, TWO[0]))
        assert (tmp_path / "status.json").stat().st_mtime > 1
        assert (tmp_path / "status.json").read_text() == before


def test_a_line_of_a_finished_step_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from magicdrive_core.training.metrics_file import MetricsFile;"
        "file = MetricsFile(Path(sys.argv[1]), 0); file.append({'step': 1, 'loss': 0.5}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "metrics.jsonl")], check=False)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


GOOD = [{"step": number, "loss": 1 / number, "skipped": []} for number in range(1, 9)]


@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([bytes(200), b"null", b"7", b'{"step": "1", "loss": 1}'])),
    st.sets(st.integers(0, 7)),
    st.data(),
)
def test_every_line_that_is_whole_is_read_whatever_stands_between(
    rubbish: list[bytes], lost: set[int], data: st.DataObject
) -> None:
    kept = [line for number, line in enumerate(GOOD) if number not in lost]
    lines = [*(json.dumps(line).encode() for line in kept), *rubbish]
    found, _ = parse_lines(b"\n".join(data.draw(st.permutations(lines))))
    assert list(found.values()) == kept


def test_a_damaged_history_neither_ends_a_run_nor_goes_unsaid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(line).encode() for line in GOOD]
    lines[2] = bytes(len(lines[2]))
    lines[3] = lines[3][:20]
    path.write_bytes(b"\n".join(lines) + b"\n")
    file = MetricsFile(path, 6)
    assert [line["step"] for line in file.lines] == [1, 2, 5, 6]
    assert caplog.messages == [
        f"{path}: line 3 to 4 is damaged and left out",
        f"{path}: step 3 to 4 is missing in it; the training itself is whole",
    ]
    file.append({"step": 7, "loss": 0.0})
    file.close()
    caplog.clear()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 5, 6, 7]


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
    with Recorder(load_config(PROFILE), plan, TrainingProgress(), torch.device("cpu")) as recorder:
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
