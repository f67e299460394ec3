"""The weights that a stage takes from the previous one, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Stage
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.training.stage import load_previous
from magicdrive_core.utils.files import write_json

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
SMALL = (
    "model={width: 32, depth: 1, heads: 2, control_depth: 1, temporal_heads: 2, box_widths: [8], map_channels: [4, 4]}"
)
SOURCE = Path("runs/stage1/ema.safetensors")


@pytest.fixture
def networks(tmp_path: Path) -> dict[Stage, MagicDrive]:
    encoders = {"vae": {"latent_channels": 4}, "text": {"width": 8}}
    write_json(tmp_path / "artifacts/encoders/encoders.json", encoders)
    stages: tuple[Stage, ...] = ("stage1", "stage2", "stage3")
    config = load_config(PROFILE, [SMALL, "text.max_tokens=5"])
    return {stage: build_stage_network(config, stage, tmp_path) for stage in stages}


def test_stage_2_adds_temporal_blocks_and_instance_noise_only(networks: dict[Stage, MagicDrive]) -> None:
    before = {name: torch.full_like(tensor, 3) for name, tensor in networks["stage1"].state_dict().items()}
    fresh = {name: tensor.clone() for name, tensor in networks["stage2"].state_dict().items()}
    new = load_previous(networks["stage2"], before, "stage2", SOURCE)
    assert {name.split(".")[0] for name in new} == {"base_blocks_t", "control_blocks_t", "bbox_embedder"}
    assert [name for name in new if name.startswith("bbox_embedder.")] == ["bbox_embedder.mean_var"]
    for name, tensor in networks["stage2"].state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in new else before[name])


def test_stage_3_takes_all_weights(networks: dict[Stage, MagicDrive]) -> None:
    assert load_previous(networks["stage3"], networks["stage2"].state_dict(), "stage3", SOURCE) == []
    with pytest.raises(MagicDriveError, match="lacks "):
        load_previous(networks["stage3"], networks["stage1"].state_dict(), "stage3", SOURCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("base_token"), "lacks base_token"),
        (lambda weights: weights.update(more=torch.zeros(1)), "has the unknown more"),
        (lambda weights: weights.update(base_token=torch.zeros(3)), "has another shape for base_token"),
    ],
)
def test_weights_of_another_network_are_refused(
    networks: dict[Stage, MagicDrive], change: object, message: str
) -> None:
    weights = dict(networks["stage1"].state_dict())
    change(weights)  # type: ignore[operator]
    before = networks["stage2"].base_token.clone()
    with pytest.raises(MagicDriveError, match=message):
        load_previous(networks["stage2"], weights, "stage2", SOURCE)
    assert torch.equal(networks["stage2"].base_token, before)
