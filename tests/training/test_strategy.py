"""ZeRO-2 through ColossalAI on two gloo ranks, against plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.training.distributed import run_distributed
from tests.training.networks import TinyNetwork, tiny_network, training


def sample(step: int, rank: int) -> torch.Tensor:
    """Rank 1 sees videos at every other step: then only it uses the layer ``video``."""
    frames = 3 if rank == 1 and step % 2 else 1
    return torch.randn(2, 6, 4, frames, 4, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (network(x, torch.full((len(x),), 300.0)) - x.roll(1, 2)).square().mean()


def plain_adamw(steps: int, precision: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    network = tiny_network()
    settings = training()
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=0.01, betas=settings.betas, eps=1e-8, weight_decay=0.01
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(loss_of(network, sample(step, rank)) for rank in range(2)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        optimizer.step()
    return network.state_dict()


def zero_steps(steps: int, precision: str) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    from magicdrive_core.training.ema import Ema
    from magicdrive_core.training.shards import gather, masters
    from magicdrive_core.training.strategy import boost

    boosted = boost(tiny_network(), training(precision=precision), torch.device("cpu"))
    ema = Ema(boosted, 0.5)
    norms = []
    for step in range(steps):
        boosted.optimizer.backward(loss_of(boosted.network, sample(step, dist.get_rank())))
        boosted.set_learning_rate(0.01)
        boosted.optimizer.step()
        norms.append(boosted.optimizer.get_grad_norm())
        boosted.optimizer.zero_grad()
        ema.update()
    before = {n: p.clone() for n, p in boosted.network.named_parameters()}
    with ema.applied():
        applied = {n: p.detach().float().clone() for n, p in boosted.network.named_parameters()}
    for name, parameter in boosted.network.named_parameters():
        assert torch.equal(parameter, before[name])
    averages = dict(gather(boosted, ema.shards, everywhere=True))
    for name, average in averages.items():
        torch.testing.assert_close(applied[name], average, atol=1e-2 if precision == "bf16" else 0, rtol=0)
    return dict(gather(boosted, masters(boosted), everywhere=True)), averages, norms


def test_zero_equals_adamw_though_ranks_use_other_layers() -> None:
    expected = plain_adamw(12)
    results = run_distributed(zero_steps, 2, 12, "fp32")
    for weights, _, _ in results:
        assert set(weights) == {n for n, p in TinyNetwork().named_parameters() if p.requires_grad}
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=0)


def test_parameters_that_no_rank_uses_are_left_alone() -> None:
    weights, averages, _ = run_distributed(zero_steps, 2, 4, "fp32")[0]
    assert torch.equal(weights["unused.weight"], tiny_network().unused.weight)
    assert torch.equal(averages["unused.weight"], tiny_network().unused.weight)


def test_ema_follows_the_master_weights() -> None:
    expected = {n: p.detach().clone() for n, p in tiny_network().named_parameters()}
    for steps in range(1, 5):
        now = plain_adamw(steps)
        expected = {n: 0.5 * e + 0.5 * now[n] for n, e in expected.items()}
    _, averages, _ = run_distributed(zero_steps, 2, 4, "fp32")[0]
    for name, average in averages.items():
        torch.testing.assert_close(average, expected[name], atol=2e-6, rtol=0)


def test_bf16_keeps_fp32_masters_near_the_fp32_result() -> None:
    expected = plain_adamw(12)
    weights, _, norms = run_distributed(zero_steps, 2, 12, "bf16")[0]
    assert weights["into.weight"].dtype == torch.float32
    assert not torch.equal(weights["into.weight"], weights["into.weight"].bfloat16().float())
    torch.testing.assert_close(weights["into.weight"], expected["into.weight"], atol=0.05, rtol=0)
    assert all(norm > 0 for norm in norms)
