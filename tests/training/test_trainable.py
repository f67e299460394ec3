"""What is trained: patterns, what they leave, and that the rest is in no optimizer and in no reduction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from magicdrive_core.config.schema import Training
from magicdrive_core.errors import UsageError
from magicdrive_core.training.check_start import check_start
from magicdrive_core.training.stage import first_network
from magicdrive_core.training.trainable import check_patterns, freeze_parameters
from tests.training.gloo_ranks import run_distributed
from tests.training.networks import tiny_network, training
from tests.training.start_models import config, filled, plan_of, project, write_run

__all__ = ["project"]


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


BIASES = {"into.bias", "unused.bias", "video.bias", "out.bias"}
ALL = BIASES | {"into.weight", "unused.weight", "video.weight", "out.weight"}


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, ALL),
        ({"train_only": ["out.*"]}, {"out.weight", "out.bias"}),
        ({"train_only": ["*.bias", "out.*"], "freeze": ["video.*", "un*"]}, {"into.bias", "out.weight", "out.bias"}),
        ({"freeze": ["*.weight"]}, BIASES),
        ({"train_only": ["frozen.*", "out.bias"]}, {"out.bias"}),
    ],
)
def test_train_only_chooses_and_freeze_takes_away(settings: dict[str, list[str]], left: set[str]) -> None:
    network = tiny_network()
    freeze_parameters(network, training(**settings), "stage1")
    assert trained(network) == left


def test_training_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"stage1: .* leave no parameter to train"):
        freeze_parameters(tiny_network(), training(freeze=["*"]), "stage1")


def test_a_pattern_that_matches_nothing_is_refused_with_names_near_to_it() -> None:
    names = [name for name, _ in tiny_network().named_parameters()]
    with pytest.raises(UsageError, match=r"training.freeze: 'vidoe\.\*' matches no parameter") as raised:
        check_patterns("training.freeze", ["into.*", "vidoe.*"], names, "parameter")
    assert raised.value.hint.startswith("near it: video")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.freeze=[base_block_s.*]", r"training.freeze: 'base_block_s\.\*' matches no parameter"),
        ("training.train_only=[bbox]", "training.train_only: 'bbox' matches no parameter"),
        ("training.lora={targets: ['*.atn.*']}", r"training.lora.targets: '\*\.atn\.\*' matches no linear map"),
        ("training.lora={targets: ['*.q_norm']}", r"training.lora.targets: '\*\.q_norm' matches no linear map"),
        ("training.train_only=['base_blocks_t.*']", "stage1: .* leave no parameter to train"),
    ],
)
def test_patterns_are_checked_before_anything_is_started(project: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_start(config(override), plan_of(project, "stage1", override), project)


def test_names_of_a_later_stage_are_no_fault(project: Path) -> None:
    override = "training.freeze=['base_blocks_t.*']"
    check_start(config(override), plan_of(project, "stage1", override), project)
    plan = plan_of(project, "stage2", override)
    assert plan.previous is not None
    write_run(plan.previous.folder, filled(project, "stage1", 1.0), "stage1")
    names = trained(first_network(config(override), plan, project))
    assert names
    assert not any(name.startswith("base_blocks_t.") for name in names)


def reduced(settings: Training) -> tuple[set[str], int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train one step; return what has a master weight, the gradients' elements in the reductions, state and start."""
    from magicdrive_core.training.state import Ema, masters
    from tests.training.networks import engine_of

    network = tiny_network()
    freeze_parameters(network, settings, "stage1")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    engine = engine_of(network, settings)
    ema = Ema(engine, 0.5)
    x = torch.randn(2, 6, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    engine.optimizer.backward(engine.network(x, torch.full((2,), 300.0)).square().mean())
    elements = sum(parameter.numel() for parameter, _ in engine.optimizer._order)
    engine.set_learning_rate(0.01)
    engine.optimizer.step()
    ema.update()
    return set(masters(engine)), elements, ema.gather(), before


def test_a_frozen_parameter_is_in_no_optimizer_and_no_reduction_and_keeps_its_value() -> None:
    names, elements, after, before = run_distributed(reduced, 2, training(train_only=["out.*"], precision="bf16"))[0]
    assert names == {"out.weight", "out.bias"}
    assert elements == 4 * 7 + 4
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == names
