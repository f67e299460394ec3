"""The memory planner against the memory that torch's allocator really hands out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from magicdrive_core.cli.main import main as cli
from magicdrive_core.inference import memory_plan as memory_table
from magicdrive_core.inference.memory_plan import (
    PUBLISHED,
    SP_SIZES,
    LiveMemory,
    Peaks,
    Planner,
    Setting,
    fused_attention,
)
from magicdrive_core.parallel.parallelize import parallelize
from tests.model.networks import conditions, config, network, noisy

VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "latent_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WIDE = config(width=128, heads=4, ego_heads=4, box_heads=4, depth=3, control_depth=2)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(WIDE, VAE, dtype=torch.float32)


def allocated(work: Callable[[], Any]) -> int:
    """Returns the most bytes that torch's allocator handed out during ``work``, beyond those before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@torch.no_grad()
@pytest.mark.parametrize("limit", [0, 400])
def test_the_plan_is_within_a_tenth_of_a_real_run(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network on meta tensors against the same one on real tensors, on a CPU that takes the paths of a GPU."""
    monkeypatch.setattr("magicdrive_core.kernels.library.usable", lambda _: False)
    real = network(width=128, heads=4, ego_heads=4, box_heads=4).requires_grad_(False)
    parallelize(real, slice_tokens=limit)
    batch, x, t = replace(conditions(slots=5), box_latent=torch.zeros(1, 5, 128)), noisy(size=(24, 40)), torch.zeros(1)
    measured = allocated(lambda: real(x, t, batch))
    fake = real.to("meta")
    inputs = x.to("meta"), t.to("meta"), batch.to("meta")
    with fused_attention(), LiveMemory() as memory:
        memory.hold(
            [
                *fake.parameters(),
                *fake.buffers(),
                *inputs[:2],
                *filter(torch.is_tensor, vars(inputs[2]).values()),
            ]
        )
        before = memory.live
        fake(*inputs)
    assert memory.peak - before == pytest.approx(measured, rel=0.1)
    assert measured > 5e6


def test_a_storage_counts_once_and_only_until_it_is_freed() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        del a
        assert memory.live == 4000
        c = b + 1
        assert memory.live == 4000 + 3200
        del b, c
        assert (memory.live, memory.peak) == (0, 7200)


def test_the_plan_grows_and_shrinks_with_its_causes(planner: Planner) -> None:
    base = planner.peaks("64x96", 17, Setting(slots=4, map_cells=40))
    longer = planner.peaks("64x96", 33, Setting(slots=4, map_cells=40))
    shared = planner.peaks("64x96", 33, Setting(slots=4, map_cells=40, sp=2))
    sliced = planner.peaks("64x96", 33, Setting(slots=4, map_cells=40, slice_tokens=300))
    beside = planner.peaks("64x96", 33, Setting(slots=4, map_cells=40, offload=False))
    assert base.sampling < longer.sampling
    assert shared.sampling < longer.sampling
    assert sliced.sampling < longer.sampling
    assert sliced.decoding == longer.decoding
    assert beside.sampling > longer.sampling
    assert beside.decoding > longer.decoding


def test_the_table_shows_planned_next_to_published(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = memory_table.GIB

    class Fixed:
        def peaks(self, size: str, frames: int, setting: Setting) -> Peaks:
            return Peaks(2 * gib, setting.sp * gib, 3 * gib)

    lines = list(memory_table.table_lines(Fixed(), Setting()))  # type: ignore[arg-type]
    assert len(lines) == 2 + len(PUBLISHED)
    assert " ".join(lines[2].split()) == ("224x400 17 2.00 / 17.91 2.00 / 17.91 4.00 / 17.91 8.00 / 17.91 3.00 / 3.87")
    assert "> 96" in lines[-1]
    assert all(len(sampling) == len(SP_SIZES) for sampling, _ in PUBLISHED.values())


@pytest.fixture
def small_planner(monkeypatch: pytest.MonkeyPatch, planner: Planner) -> None:
    monkeypatch.setattr("magicdrive_core.inference.memory_plan.Planner", lambda: planner)


@pytest.mark.usefixtures("small_planner")
def test_the_command_prints_each_phase_and_refuses_bad_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(["memory", "--size", "64x96", "--frames", "9", "--boxes", "3", "--no-offload"])
    assert ended.value.code == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["encoding", "sampling", "decoding"]
    for words in (["--size", "9x9"], ["--size", "64x96", "--frames", "8"]):
        with pytest.raises(SystemExit) as ended:
            cli(["memory", *words])
        assert ended.value.code == 2
