"""The engine on two gloo ranks against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.training.gloo_ranks import run_distributed
from tests.training.networks import TinyNetwork, tiny_network, training


def sample(step: int, rank: int) -> torch.Tensor:
    """Draw an input. Rank 1 has a video at every other step: then it alone uses the layer ``video``."""
    frames = 3 if rank == 1 and step % 2 else 1
    return torch.randn(2, 6, 4, frames, 4, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (network(x, torch.full((len(x),), 300.0)) - x.roll(1, 2)).square().mean()


def plain_adamw(steps: int) -> dict[str, torch.Tensor]:
    network = tiny_network()
    settings = training()
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=0.01, betas=settings.betas, eps=1e-8, weight_decay=0.01
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(loss_of(network, sample(step, rank)) for rank in range(2)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
    return network.state_dict()


def zero_steps(steps: int, precision: str, parts: int = 1) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    from magicdrive_core.training.state import Ema, gather, masters
    from tests.training.networks import engine_of

    engine = engine_of(tiny_network(), training(precision=precision))
    ema = Ema(engine, 0.5)
    norms = []
    for step in range(steps):
        for part in sample(step, dist.get_rank()).chunk(parts):
            engine.optimizer.backward(loss_of(engine.network, part) / parts)
        engine.set_learning_rate(0.01)
        engine.optimizer.step()
        norms.append(engine.optimizer.get_grad_norm())
        engine.optimizer.zero_grad()
        ema.update()
    before = {n: p.clone() for n, p in engine.network.named_parameters()}
    with ema.applied():
        applied = {n: p.detach().float().clone() for n, p in engine.network.named_parameters()}
    for name, parameter in engine.network.named_parameters():
        assert torch.equal(parameter, before[name])
    averages = dict(gather(engine, ema.shards, everywhere=True))
    for name, average in averages.items():
        torch.testing.assert_close(applied[name], average, atol=0 if precision == "fp32" else 1e-2, rtol=0)
    return dict(gather(engine, masters(engine), everywhere=True)), averages, norms


@pytest.mark.parametrize("parts", [1, 2])
def test_zero_equals_adamw_when_ranks_use_different_layers(parts: int) -> None:
    """It holds in one backward pass, and in two whose gradients add up."""
    expected = plain_adamw(12)
    results = run_distributed(zero_steps, 2, 12, "fp32", parts)
    for weights, _, _ in results:
        assert set(weights) == {n for n, p in TinyNetwork().named_parameters() if p.requires_grad}
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=0)


def test_parameters_that_no_rank_uses_stay_unchanged() -> None:
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


@pytest.mark.parametrize(("precision", "atol"), [("bf16", 0.05), ("fp16", 0.006)])
def test_low_precisions_keep_fp32_masters_near_the_fp32_result(precision: str, atol: float) -> None:
    expected = plain_adamw(12)
    _, _, exact = run_distributed(zero_steps, 2, 12, "fp32")[0]
    weights, _, norms = run_distributed(zero_steps, 2, 12, precision)[0]
    assert weights["into.weight"].dtype == torch.float32
    rounded = weights["into.weight"].to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    assert not torch.equal(weights["into.weight"], rounded.float())
    torch.testing.assert_close(weights["into.weight"], expected["into.weight"], atol=atol, rtol=0)
    assert norms == pytest.approx(exact, rel=0.05)  # fp16's are those of the gradients, not of the scaled ones


def summed_in_low_precision() -> tuple[float, set[torch.dtype]]:
    """Return 1 + 64 / 2^12, added one small part at a time: in bf16 each part would be rounded away."""
    from tests.training.networks import engine_of

    engine = engine_of(tiny_network(), training(precision="bf16", max_grad_norm=1e9))
    for part in [1.0] + [2**-12] * 64:
        engine.optimizer.backward(part * engine.network.out.bias.float().sum())
    (group,) = engine.optimizer.pg_to_grad_store.values()
    gradient = group.get_working_grad_by_param_id(id(engine.network.out.bias))
    assert gradient is not None
    engine.optimizer.zero_grad()
    return float(gradient[0]), {gradient.dtype}


def test_gradients_of_several_passes_are_added_in_fp32() -> None:
    assert run_distributed(summed_in_low_precision, 2) == [(1 + 64 / 2**12, {torch.float32})] * 2


def masters_at_the_start(precision: str) -> tuple[bool, bool]:
    """Return whether all masters equal the fp32 weights, and whether the working weights equal the masters."""
    from magicdrive_core.training.state import gather, masters
    from tests.training.networks import engine_of

    network = tiny_network()
    exact = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    engine = engine_of(network, training(precision=precision))
    weights = dict(gather(engine, masters(engine), everywhere=True))
    working = dict(engine.network.named_parameters())
    equal = all(torch.equal(weight, exact[name]) for name, weight in weights.items())
    return equal, all(torch.equal(working[name].float(), weight) for name, weight in weights.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_master_weights_start_exact(precision: str) -> None:
    """They are the network's fp32 weights, not what the working precision left of them."""
    assert run_distributed(masters_at_the_start, 2, precision) == [(True, precision == "fp32")] * 2


def shapes_of_a_layer_norm() -> tuple[int, ...]:
    import magicdrive_core.training.engine  # noqa: F401 - imports ColossalAI

    x = torch.zeros(2, 3, 8, device="meta", requires_grad=True)
    torch.nn.functional.layer_norm(x, (8,)).sum().backward()
    return tuple(torch.native_layer_norm(x, (8,), None, None, 1e-5)[1].shape)


def test_the_engine_leaves_the_shape_functions_of_torch_alone() -> None:
    """ColossalAI replaces some by wrong ones, on which compilation and meta tensors then rely."""
    assert run_distributed(shapes_of_a_layer_norm, 2)[0] == (2, 3, 1)
