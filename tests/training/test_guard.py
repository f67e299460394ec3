"""Losses and gradients that are not finite: found where they arise, skipped, and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json
from tests.training.gloo_ranks import run_distributed
from tests.training.networks import tiny_network, training
from tests.training.test_checkpoints import names
from tests.training.test_engine import loss_of, sample
from tests.training.test_loop import assert_equal_ends, job, train_once, whole
from tests.training.tiny_rank import NeverStop, train_tiny

__all__ = ["whole"]


def train_in_trouble(folder: Path, trouble: str) -> str:
    try:
        return str(train_tiny(folder, NeverStop(), trouble))
    except MagicDriveError as error:
        return error.message


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_without_a_finite_loss_is_skipped_and_the_next_one_counts(tmp_path: Path) -> None:
    job(tmp_path)
    assert run_distributed(train_in_trouble, 2, tmp_path, "nan-1-2,nan-1-4,nan-0-5") == ["0", "0"]
    skipped = {line["step"] - 1: line["skipped"] for line in lines(tmp_path) if line["skipped"]}
    assert skipped == {
        2: ["the loss of rank 1 is nan"],
        4: ["the loss of rank 1 is nan"],
        5: ["the loss of rank 0 is nan"],
    }
    assert [line["loss"] is None for line in lines(tmp_path)] == [False, False, True, False, True, True, False, False]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "ema.safetensors").values())
    # Due after steps 3 and 6, which were skipped: started after the next good one.
    assert names(tmp_path) == ["step-00000004", "step-00000007"]


def test_too_many_skipped_steps_in_a_row_end_with_a_report(whole: Path, tmp_path: Path) -> None:
    plan = job(tmp_path)
    messages = run_distributed(train_in_trouble, 2, tmp_path, "nan-1-4,nan-0-5,nan-1-6")
    report = tmp_path / "nonfinite.json"
    expected = "no finite loss and gradient from step 4 to 6 (step 4: the loss of rank 1 is nan); report: "
    assert messages == [f"{expected}{report}"] * 2
    assert not plan.done
    assert names(tmp_path) == ["step-00000003"]
    facts = read_json(report)
    assert facts["resumes_from"] == "step-00000003"
    assert [step["step"] for step in facts["skipped"]] == [4, 5, 6]
    assert facts["skipped"][1]["faults"] == ["the loss of rank 0 is nan"]
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)


def faulty_step(rank: int, where: str, precision: str) -> tuple[list[str], list[str], bool, bool]:
    """Make a step with a NaN on ``rank`` and a good one; return the faults and whether only the second counted."""
    from colossalai.zero.low_level import low_level_optim

    from magicdrive_core.parallel import control
    from magicdrive_core.training.guard import find_faults
    from tests.training.networks import engine_of

    engine = engine_of(tiny_network(), training(precision=precision))
    before = {n: p.detach().clone() for n, p in engine.network.named_parameters()}
    poisoned = {rank} & {dist.get_rank()}
    reduce = dist.reduce_scatter_tensor
    dtypes = set()

    def on_the_way(output: torch.Tensor, source: torch.Tensor, **options: Any) -> None:
        reduce(output, source, **options)
        dtypes.add(source.dtype)
        if where == "reduction" and poisoned:
            output[0] = float("nan")

    def in_the_network(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if where == "gradient" and poisoned else gradient

    engine.network.into.weight.register_hook(in_the_network)

    def found() -> list[str]:
        engine.optimizer.backward(loss_of(engine.network, sample(0, dist.get_rank())))
        everyone = control.gather(engine.optimizer.read_passes([])[1])
        facts: list[Any] = [mock.Mock(loss=0.5, gradients=check) for check in everyone]
        return find_faults(facts)

    with mock.patch.object(low_level_optim.dist, "reduce_scatter_tensor", on_the_way):
        first = found()
        engine.optimizer.zero_grad()
        untouched = all(torch.equal(p, before[n]) for n, p in engine.network.named_parameters())
        poisoned.clear()
        second = found()
        engine.set_learning_rate(0.01)
        engine.optimizer.step()
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    moved = not torch.equal(engine.network.out.weight, before["out.weight"])
    finite = all(parameter.isfinite().all() for parameter in engine.network.parameters())
    return first, second, untouched, bool(moved and finite)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("gradient", "the gradient of into.weight on rank {} is not finite"),
        ("reduction", "rank {} received a non-finite sum of finite gradients (see ColossalAI #6091)"),
    ],
)
def test_a_gradient_that_is_not_finite_is_found_where_it_arises(
    where: str, message: str, rank: int, precision: str
) -> None:
    """Gradients travel in the working precision; a skipped step leaves no trace in the next one."""
    for first, second, untouched, good in run_distributed(faulty_step, 2, rank, where, precision):
        assert first == [message.format(rank)]
        assert second == []
        assert untouched
        assert good


def step_with_infinite_gradient() -> tuple[str, bool]:
    from tests.training.networks import engine_of

    engine = engine_of(tiny_network(), training())
    before = {n: p.detach().clone() for n, p in engine.network.named_parameters()}
    engine.optimizer.backward(loss_of(engine.network, sample(0, dist.get_rank())) * float("inf"))
    engine.set_learning_rate(0.01)
    with pytest.raises(MagicDriveError) as caught:
        engine.optimizer.step()
    return caught.value.message, all(torch.equal(p, before[n]) for n, p in engine.network.named_parameters())


def test_the_optimizer_refuses_a_norm_that_is_not_finite() -> None:
    assert run_distributed(step_with_infinite_gradient, 2) == [("the norm of the gradient is not finite", True)] * 2


class Still(torch.nn.Module):
    """Predicts zeros in bf16, and keeps its inputs."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, *_: Any) -> torch.Tensor:
        self.inputs = x, t
        return torch.zeros_like(x, dtype=torch.bfloat16)


def test_loss_target_and_noise_level_are_fp32() -> None:
    from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
    from magicdrive_core.training.loop import flow_loss
    from tests.training.tiny_rank import made_up_batch

    latents = torch.randn(2, 6, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    batch = made_up_batch(0, (9, 16, 16), latents, torch.Generator().manual_seed(2), RectifiedFlow())
    engine: Any = mock.Mock(network=Still(), device=torch.device("cpu"))
    losses = flow_loss(engine, batch)
    x_t, t = engine.network.inputs
    assert (losses.dtype, x_t.dtype, t.dtype) == (torch.float32,) * 3
    generator = torch.Generator().manual_seed(2)  # draws the noise levels, then the noise
    level = RectifiedFlow().draw_timesteps(generator, 2, batch.shape)
    assert torch.equal(t, level)
    assert not torch.equal(level, level.bfloat16().float())
    noise = torch.randn(latents.shape, generator=generator)
    expected = (latents.double() - noise.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
