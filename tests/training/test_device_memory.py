"""The plan of training memory against real training, and what is said of a stage that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from magicdrive_core.cli.main import main as cli
from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config
from magicdrive_core.errors import UsageError
from magicdrive_core.inference.memory_plan import LiveMemory
from magicdrive_core.model.build import build_network
from magicdrive_core.parallel.gradient_order import arrival_order
from magicdrive_core.parallel.mesh import Mesh
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.training.engine import build_engine
from magicdrive_core.training.loader import Batch
from magicdrive_core.training.memory_plan import (
    TrainingPlanner,
    blank_batch,
    check_device,
    network_config,
    train_micro_batch,
)
from magicdrive_core.training.state import masters
from tests.conftest import PROJECT
from tests.training.gloo_ranks import run_distributed

SETTINGS = [
    "model={width: 96, depth: 4, heads: 4, control_depth: 2, temporal_heads: 2, box_widths: [9], map_channels: [4, 4]}",
    "conditions.map_cells={80x144: 72, 96x176: 88, 224x400: 72}",
    "training.stage3.buckets=[{resolution: 224x400, frames: 1, batch: 2}]",
    "training.precision=fp32",
    "cluster.ranks=2",
]


def settings(*more: str) -> Config:
    return load_config(PROJECT / "profiles/demo.yaml", [*SETTINGS, *more])


def plan(config: Config, project: Path = Path("no project")) -> int:
    with TrainingPlanner(config, "stage3", project) as planner:
        return planner.plan(config.training.stage3.buckets[0]).activations


def really_held(config: Config) -> int:
    """Returns the most bytes that this rank holds for a micro-batch, on a CPU that takes the paths of a GPU.

    Real tensors, kernels and gloo; that the count agrees with torch's allocator is tested with the plan of generation.
    """
    stage, device = config.training.stage3, torch.device("cpu")
    network = build_network(network_config(config, "stage3", Path("no project")))
    network.y_embedder.requires_grad_(False)
    order = arrival_order(network)
    mesh = Mesh.of(config.cluster.sequence_parallel_of("stage3"))
    parallelize(network, sequence_group=mesh.sequence_group, recompute_every=int(stage.checkpoint_blocks))
    engine = build_engine(network, config.training, device, order)
    batch = blank_batch(config, stage.buckets[0], network.config, device)
    usable, rows = "magicdrive_core.kernels.library.usable", "magicdrive_core.kernels.functions.ROWS"
    memory = LiveMemory("cpu")
    memory.hold([*network.parameters(), *network.buffers(), *masters(engine).values(), *tensors_of(batch)])
    before = memory.live
    with patch(usable, lambda _: False), patch(rows, 1 << 30), memory:
        train_micro_batch(engine, batch)
    return memory.peak - before


def tensors_of(batch: Batch) -> Iterator[torch.Tensor]:
    yield from (batch.latents, batch.noise, batch.t)
    yield from filter(torch.is_tensor, vars(batch.conditions).values())


@pytest.mark.parametrize("checkpoint_blocks", ["false", "true"])
@pytest.mark.parametrize("share", [1, 2])
def test_the_plan_is_within_a_tenth_of_a_real_step(share: int, checkpoint_blocks: str) -> None:
    config = settings(f"cluster.sequence_parallel={share}", f"training.stage3.checkpoint_blocks={checkpoint_blocks}")
    planned = plan(config)
    for real in run_distributed(really_held, 2, config):
        assert planned == pytest.approx(real, rel=0.1)


def test_activation_checkpointing_and_shared_clips_need_less() -> None:
    whole = plan(settings())
    assert plan(settings("training.stage3.checkpoint_blocks=true")) < 0.5 * whole
    assert plan(settings("cluster.sequence_parallel=2")) < 0.7 * whole


def test_more_ranks_hold_smaller_shards_of_masters_and_moments() -> None:
    sizes = []
    for ranks in (2, 8):
        config = settings(f"cluster.ranks={ranks}")
        with TrainingPlanner(config, "stage3", Path("no project")) as planner:
            memory = planner.plan(config.training.stage3.buckets[0])
        assert memory.masters == pytest.approx(3 * memory.ema, rel=0.01)
        sizes.append(memory.masters)
    assert sizes[0] == pytest.approx(4 * sizes[1], rel=0.01)


def test_a_stage_that_does_not_fit_is_refused_with_the_setting_that_makes_it_fit() -> None:
    config = settings()
    with TrainingPlanner(settings("training.stage3.checkpoint_blocks=true"), "stage3", Path("no project")) as planner:
        needed = 1.2 * planner.plan(config.training.stage3.buckets[0]).peak  # a tenth of a device stays free
    with pytest.raises(UsageError, match=r"2 clips of 224x400-1 take .* of a device, which has") as caught:
        check_device(config, "stage3", needed, Path("no project"))
    assert caught.value.hint == "set training.stage3.checkpoint_blocks=true"
    with pytest.raises(UsageError) as caught:
        check_device(config, "stage3", 1e6, Path("no project"))
    assert caught.value.hint == "reduce its batch of 2, or use more ranks"
    check_device(config, "stage3", 1e9, Path("no project"))


def test_adapters_need_less_than_all_weights() -> None:
    with TrainingPlanner(settings("training.lora={rank: 4}"), "stage3", Path("no project")) as planner:
        adapters = planner.plan(settings().training.stage3.buckets[0])
    with TrainingPlanner(settings(), "stage3", Path("no project")) as planner:
        whole = planner.plan(settings().training.stage3.buckets[0])
    assert adapters.masters < 0.3 * whole.masters
    assert adapters.peak < whole.peak


def test_the_command_lists_every_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    sets = [word for setting in SETTINGS for word in ("-S", setting)]
    arguments = ["train-memory", "stage3", "--params", str(PROJECT / "profiles/demo.yaml"), "--device", "1", *sets]
    with pytest.raises(SystemExit) as ended:
        cli(arguments)
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage3: 2 ranks, 1 for each clip, ZeRO-2, without activation checkpointing")
    assert [line.split()[0] for line in lines[2:]] == ["224x400-1"]
    assert lines[2].endswith("fits 1 GB")
