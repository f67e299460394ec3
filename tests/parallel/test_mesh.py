"""Sequence parallelism in training: ZeRO-2 steps of ranks that share a clip, against one device and plain AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from magicdrive_core.config.load import load_config
from magicdrive_core.errors import UsageError
from magicdrive_core.model.transformer import MagicDrive
from tests.model.networks import conditions, network, noisy
from tests.training.gloo_ranks import run_distributed
from tests.training.networks import training
from tests.training.test_loader import PROFILE

SHAPE = (9, 48, 80)  # frames, height, width: 3 x 5 tokens, of which two ranks have eight and seven


def batch(step: int) -> Any:
    from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
    from magicdrive_core.training.loader import Batch

    draw = torch.Generator().manual_seed(step)
    mask = torch.tensor([[step == 0, True, True]])
    latents = noisy(size=(6, 10), seed=step)
    t = RectifiedFlow().draw_timesteps(draw, 1, SHAPE)
    noise = torch.randn(latents.shape, generator=draw)
    return Batch(0, SHAPE, latents, conditions(seed=step), mask, t, noise, draw, 0.0)


def made() -> MagicDrive:
    return network(depth=1).train()


def shared_steps(precision: str) -> tuple[list[float], list[float], dict[str, Tensor], tuple[int, int, int]]:
    """Two steps of two ranks that share every clip: losses, norms, master weights, position in the mesh."""
    from magicdrive_core.parallel.gradient_order import arrival_order
    from magicdrive_core.parallel.mesh import Mesh
    from magicdrive_core.parallel.parallelize import parallelize
    from magicdrive_core.training.engine import build_engine
    from magicdrive_core.training.loop import flow_loss
    from magicdrive_core.training.state import gather, masters

    net, mesh = made(), Mesh.of(2)
    order = arrival_order(net)
    parallelize(net, sequence_group=mesh.sequence_group)
    engine = build_engine(net, training(precision=precision), torch.device("cpu"), order)
    losses, norms = [], []
    for step in range(2):
        loss = flow_loss(engine, batch(step)).mean()
        engine.optimizer.backward(loss)
        engine.set_learning_rate(0.01)
        engine.optimizer.step()
        norms.append(float(engine.optimizer.get_grad_norm()))
        engine.optimizer.zero_grad()
        losses.append(loss.item())
    weights = dict(gather(engine, masters(engine), everywhere=True))
    return losses, norms, weights, (mesh.groups, mesh.group, mesh.sequence_parallel)


def single_process() -> tuple[list[float], list[float], dict[str, Tensor]]:
    from magicdrive_core.training.loop import flow_loss

    net, shared = made(), training()
    engine: Any = type("SingleProcess", (), {"network": net, "device": torch.device("cpu")})
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=0.01, betas=shared.betas, eps=1e-8, weight_decay=0.01
    )
    losses, norms = [], []
    for step in range(2):
        optimizer.zero_grad()
        loss = flow_loss(engine, batch(step)).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), shared.max_grad_norm)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def test_two_ranks_train_one_clip_as_one_device_does() -> None:
    losses, norms, weights = single_process()
    results = run_distributed(shared_steps, 2, "fp32")
    for rank, (shared_losses, shared_norms, shared_weights, position) in enumerate(results):
        assert position == (1, 0, 2), rank
        assert shared_losses == pytest.approx(losses, rel=1e-5)
        assert shared_norms == pytest.approx(norms, rel=1e-5)
        moved = sum((p - before).square().sum() for p, before in zip(weights.values(), _start(), strict=True)).sqrt()
        apart = sum((shared_weights[name] - weights[name]).square().sum() for name in weights).sqrt()
        assert apart < 1e-3 * moved


def _start() -> list[Tensor]:
    return [p.detach() for p in made().parameters() if p.requires_grad]


def test_bf16_too() -> None:
    losses, _, _ = single_process()
    for shared_losses, *_ in run_distributed(shared_steps, 2, "bf16"):
        assert shared_losses == pytest.approx(losses, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.ranks=4", "cluster.sequence_parallel=8"],
            "cluster.sequence_parallel 8 does not divide cluster.ranks 4",
        ),
        (["cluster.ranks=6", "cluster.sequence_parallel=3"], "cluster.sequence_parallel 3 does not divide model.heads"),
        (["generate.sequence_parallel=3"], "generate.sequence_parallel 3 does not divide model.heads 2"),
        (["generate.pad_patches=4"], "generate.pad_patches needs published: true"),
        (["training.stage3.simulate_sizes=[4, 8]"], "training.stage3.simulate_sizes needs published: true"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_config(PROFILE, overrides)
    assert "\n" not in caught.value.message


def test_possible_sizes_are_not() -> None:
    overrides = [
        "cluster.ranks=4",
        "cluster.sequence_parallel=2",
        "published=true",
        "training.stage3.simulate_sizes=[4]",
    ]
    assert load_config(PROFILE, overrides).cluster.sequence_parallel == 2
