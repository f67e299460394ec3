"""Eight ranks that share clips in twos and fours train as one device does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from magicdrive_core.model.transformer import MagicDrive
from tests.model.networks import conditions, network, noisy
from tests.training.gloo_ranks import run_distributed
from tests.training.networks import training

pytestmark = pytest.mark.drill

STEPS, RANKS = 2, 8


def made() -> MagicDrive:
    return network(depth=2, heads=4).train()


def batch(index: int) -> Any:
    """Draw a micro-batch: a video with a conditioning frame, or an image, in turn."""
    from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
    from magicdrive_core.training.loader import Batch

    draw = torch.Generator().manual_seed(index)
    frames, latent_frames = (9, 3) if index % 2 else (1, 1)
    shape = (frames, 48, 80)
    latents = noisy(latents=latent_frames, size=(6, 10), seed=index)
    mask = torch.tensor([[False, True, True]]) if frames > 1 else None
    t = RectifiedFlow().draw_timesteps(draw, 1, shape)
    noise = torch.randn(latents.shape, generator=draw)
    return Batch(0, shape, latents, conditions(frames=frames, seed=index), mask, t, noise, draw, 0.0)


def steps_of_a_rank(share: int, precision: str) -> tuple[list[float], dict[str, Tensor]]:
    from magicdrive_core.parallel.gradient_order import arrival_order
    from magicdrive_core.parallel.mesh import Mesh
    from magicdrive_core.parallel.parallelize import parallelize
    from magicdrive_core.training.engine import build_engine
    from magicdrive_core.training.loop import flow_loss
    from magicdrive_core.training.state import gather, masters

    net, mesh = made(), Mesh.of(share)
    order = arrival_order(net)
    parallelize(net, sequence_group=mesh.sequence_group, recompute_every=1)
    engine = build_engine(net, training(precision=precision), torch.device("cpu"), order)
    norms = []
    for step in range(STEPS):
        losses = flow_loss(engine, batch(step * mesh.groups + mesh.group))
        engine.optimizer.backward(losses.mean())
        norms.append(engine.optimizer.read_passes([losses])[1].norm)
        engine.set_learning_rate(0.01)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    return norms, dict(gather(engine, masters(engine), everywhere=True))


def steps_of_one_device(groups: int) -> tuple[list[float], dict[str, Tensor]]:
    from magicdrive_core.training.loop import flow_loss

    net, shared = made(), training()
    engine: Any = type("SingleProcess", (), {"network": net, "device": torch.device("cpu")})
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, betas=shared.betas, eps=1e-8, weight_decay=0.01)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for group in range(groups):
            (flow_loss(engine, batch(step * groups + group)).mean() / groups).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), shared.max_grad_norm)))
        optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize("share", [2, 4])
def test_eight_ranks_with_images_and_videos_train_as_one_device(share: int) -> None:
    """With ZeRO-2, sequence parallelism and activation checkpointing, to rounding in fp32."""
    norms, weights = steps_of_one_device(RANKS // share)
    results = run_distributed(steps_of_a_rank, RANKS, share, "fp32")
    start = {name: parameter.detach() for name, parameter in made().named_parameters()}
    moved = sum((weights[name] - start[name]).square().sum() for name in weights).sqrt()
    for own_norms, own in results:
        assert own_norms == pytest.approx(norms, rel=1e-4)
        assert all(torch.equal(weight, results[0][1][name]) for name, weight in own.items())
        assert sum((own[name] - weights[name]).square().sum() for name in weights).sqrt() < 1e-3 * moved


@pytest.mark.parametrize("share", [2, 4])
def test_eight_ranks_in_bf16_agree_bit_for_bit_and_with_one_device_roughly(share: int) -> None:
    norms, _ = steps_of_one_device(RANKS // share)
    results = run_distributed(steps_of_a_rank, RANKS, share, "bf16")
    assert results[0][0] == pytest.approx(norms, rel=0.1)
    for own_norms, own in results:
        assert own_norms == results[0][0]
        assert all(torch.equal(weight, results[0][1][name]) for name, weight in own.items())
