"""Adapters of low rank: they count wherever a weight is read, resume exactly, are saved small and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from magicdrive_core.config.schema import Lora
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.training.lora import AdaptedLinear, add_adapters, draw_dropout, merge
from magicdrive_core.training.stage import first_network
from tests.model.networks import conditions, network, noisy
from tests.parallel.devices import on_devices
from tests.training.adapted_rank import train_adapters
from tests.training.gloo_ranks import run_distributed
from tests.training.networks import stage, tiny_network
from tests.training.start_models import config, filled, plan_of, project, write_run
from tests.training.test_loop import job, losses

__all__ = ["project"]
LORA = Lora(rank=2, alpha=4.0, targets=["*"])
TIME = torch.tensor([400.0])


def adapted(*, dropout: float = 0.0, targets: tuple[str, ...] = ("*",), published: bool = False) -> MagicDrive:
    """A real network whose adapters all have an effect."""
    made = network(heads=4, depth=1, published=published).requires_grad_(False)
    add_adapters(made, LORA.model_copy(update={"targets": list(targets), "dropout": dropout}))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return made


def output(made: MagicDrive) -> Tensor:
    return made(noisy(size=(6, 10)), TIME, conditions())


@pytest.mark.parametrize("published", [False, True])
def test_every_linear_map_with_an_adapter_computes_what_the_merged_network_computes(published: bool) -> None:
    """Fused functions read the weights of some maps, and are called with others: each adapter must count."""
    made = adapted(published=published)
    plain = network(heads=4, depth=1, published=published)
    before = output(plain)
    names = [name for name, module in made.named_modules() if isinstance(module, AdaptedLinear)]
    assert names == [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    plain.load_state_dict(merge(made.state_dict(), LORA))
    assert (output(made) - before).abs().max() > 0.1
    torch.testing.assert_close(output(made), output(plain), rtol=1e-4, atol=1e-5)
    output(made).square().mean().backward()
    missing = [
        name for name, parameter in made.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not missing
    assert all(p.grad is None for name, p in made.named_parameters() if "lora_" not in name)


def test_fresh_adapters_change_nothing() -> None:
    made = network(heads=4, depth=1).requires_grad_(False)
    before = output(made)
    add_adapters(made, LORA)
    assert torch.equal(output(made), before)


def gradients(made: MagicDrive) -> dict[str, Tensor]:
    made.zero_grad()
    output(made).square().mean().backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit_with_dropout_too() -> None:
    made = adapted(dropout=0.4)
    draw_dropout(made, 0.4, torch.Generator().manual_seed(1))
    parallelize(made)
    expected = gradients(made)
    parallelize(made, recompute_every=1)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(made).items())


def test_ranks_that_share_tokens_compute_one_result() -> None:
    made = adapted()
    with torch.no_grad():
        whole = output(made)
    for part in on_devices(made, 2, output):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def test_bf16_adapters_stay_near_those_of_fp32() -> None:
    made = adapted()
    expected = output(made)
    error = (output(made.bfloat16()).float() - expected).norm() / expected.norm()
    assert error < 0.05


def test_dropout_leaves_channels_out_in_training_only() -> None:
    made = adapted(dropout=0.5)
    whole = output(made)
    draw_dropout(made, 0.5, torch.Generator().manual_seed(1))
    first = output(made)
    draw_dropout(made, 0.5, torch.Generator().manual_seed(2))
    assert len({float(each.detach().sum()) for each in (whole, first, output(made))}) == 3
    with torch.no_grad():
        torch.testing.assert_close(output(made), whole)


def tiny_job(folder: Path, **changes: object) -> None:
    job(folder, **{"lora": {"rank": 2, "targets": ["into", "video", "out"], "dropout": 0.3}} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight uninterrupted steps of two ranks, in bf16 and with dropout."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_job(folder, precision="bf16")
    assert run_distributed(train_adapters, 2, folder) == [0, 0]
    return folder


def test_adapters_resume_exactly(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    tiny_job(folder, precision="bf16")
    for name in ("ema.safetensors", "run.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    assert run_distributed(train_adapters, 2, folder) == [0, 0]
    assert losses(folder) == losses(whole)
    for name in ("ema.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_one_rank_with_two_micro_batches_equals_two_ranks(tmp_path: Path) -> None:
    tiny_job(tmp_path / "two")
    assert run_distributed(train_adapters, 2, tmp_path / "two") == [0, 0]
    tiny_job(tmp_path / "one", stage1=stage(accumulate=2))
    assert run_distributed(train_adapters, 1, tmp_path / "one") == [0]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    one, two = (load_file(tmp_path / name / "ema.safetensors") for name in ("one", "two"))
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_weights_are_the_start_and_the_saved_adapters_together(whole: Path) -> None:
    """Peft itself reads the adapters; what was trained in full lies beside them; nothing else has changed."""
    merged, start = load_file(whole / "ema.safetensors"), tiny_network().state_dict()
    assert list(merged) == sorted(start)
    settings = LoraConfig.from_pretrained(str(whole / "adapter"))
    assert (settings.r, settings.lora_alpha) == (2, 16.0)
    model = tiny_network()
    model.load_state_dict(start | load_file(whole / "adapter/trained.safetensors"))
    inject_adapter_in_model(settings, model)
    set_peft_model_state_dict(model, load_peft_weights(str(whole / "adapter"), device="cpu"))
    for name in ("into", "video", "out"):
        module = model.get_submodule(name)
        expected = module.base_layer.weight + module.get_delta_weight("default")
        torch.testing.assert_close(merged[f"{name}.weight"], expected)
        assert not torch.equal(merged[f"{name}.weight"], start[f"{name}.weight"])
    changed = {name for name in start if not torch.equal(merged[name], start[name])}
    assert changed == {"into.weight", "video.weight", "out.weight", "out.bias"}
    assert set(load_file(whole / "adapter/trained.safetensors")) == {"out.bias"}


def test_what_a_stage_adds_is_trained_in_full_beside_the_adapters(project: Path) -> None:
    """A new temporal block is noise: adapters could not make up for that."""
    write_run(project / "model", filled(project, "stage1", 0.1), "stage1")
    settings = config("training.first_stage=stage2", "training.lora={rank: 2}")
    plan = plan_of(project, "stage2", "training.first_stage=stage2", "training.lora={rank: 2}")
    made = first_network(settings, plan, project)
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    kinds = {name.split(".")[0] for name in trained if "lora_" not in name}
    assert kinds == {"base_blocks_t", "control_blocks_t", "bbox_embedder"}
    assert {name.split(".")[0] for name in trained if "lora_" in name} == {"base_blocks_s", "control_blocks_s"}


def test_fingerprints_hold_what_is_trained(project: Path) -> None:
    settings = ["training.lora={rank: 2}", "training.lora={rank: 4}", "training.freeze=['*.bias']", "profile=other"]
    prints = [plan_of(project, "stage1", override).fingerprint for override in settings]
    assert len(set(prints)) == 4
    assert plan_of(project, "stage1").fingerprint == prints[3]


def test_metrics_are_written_as_ever(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(line["grad_norm"] > 0 for line in lines)
