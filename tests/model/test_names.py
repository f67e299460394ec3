"""Names, shapes and kinds of the state dict against the model card, for the XL network of all stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from magicdrive_core.model.build import build_network
from magicdrive_core.model.published.checkpoint import PUBLISHED_XL
from tests.golden.sets import model_card


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return model_card()


@pytest.mark.parametrize(
    ("stage", "entries", "parameters"), [("stage1", 1044, 1_147_979_125), ("stage3", 1768, 2_036_730_009)]
)
def test_xl_network_has_the_published_state_dict(
    card: dict[str, Any], stage: str, entries: int, parameters: int
) -> None:
    first = stage == "stage1"
    config = replace(PUBLISHED_XL, temporal=not first, instance_latent=not first, mean_over_frames=first)
    with torch.device("meta"):
        network = build_network(config)
    state, own = network.state_dict(), dict(network.named_parameters())
    ours = {name: (list(tensor.shape), "parameter" if name in own else "buffer") for name, tensor in state.items()}
    published = {name: (shape, kind) for name, shape, _, kind, _ in card["state_dict"][stage]}
    assert ours == published
    assert len(state) == entries
    assert sum(parameter.numel() for parameter in own.values()) == parameters

    frozen = {name for name, parameter in own.items() if not parameter.requires_grad}
    network.y_embedder.requires_grad_(False)
    trainable = sum(parameter.numel() for parameter in own.values() if parameter.requires_grad)
    # The embedders' rotary tables are trainable on the card but get no gradient there (golden notes, oddity 6).
    assert frozen == {"rope.freqs", "frame_embedder.rope.freqs", "bbox_embedder.rope.freqs"}
    if not first:
        assert trainable == card["stages"][stage]["parameters_trainable"] - 2 * 72


def test_default_network_has_the_same_names(card: dict[str, Any]) -> None:
    """So that what is trained here can be carried on as published weights can."""
    with torch.device("meta"):
        ours = build_network(replace(PUBLISHED_XL, published=False)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == {
        name: shape for name, shape, *_ in card["state_dict"]["stage3"]
    }


def test_initialisation_is_the_card_s(card: dict[str, Any]) -> None:
    small = replace(PUBLISHED_XL, width=64, depth=2, heads=2, control_depth=1, box_widths=(64, 32), text_width=64)
    torch.manual_seed(0)
    network = build_network(replace(small, ego_heads=2, box_heads=2, map_channels=(4, 8, 8)))
    zero = set()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            if module.bias is not None:
                assert not module.bias.any(), name
            if not module.weight.any():
                zero.add(".".join("*" if part.isdigit() else part for part in name.split(".")))
    assert zero == set(card["initialisation"]["zero_weight_and_bias"])
    for table in (network.base_blocks_s[1].scale_shift_table, network.bbox_embedder.scale_shift_table):
        assert table.std().item() == pytest.approx(64**-0.5, rel=0.2)
    assert network.camera_embedder.emb2token.weight.std().item() == pytest.approx(0.02, rel=0.1)
