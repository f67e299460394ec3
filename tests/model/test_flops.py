"""The counted operations of a training step, against torch's own count of what the network does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.flops import FORWARD_AND_BACKWARD, training_flops
from magicdrive_core.model.inputs import Conditions

SIZES = NetworkConfig(
    width=64,
    depth=3,
    heads=4,
    control_depth=2,
    ego_heads=4,
    box_heads=4,
    box_widths=(32, 16),
    map_channels=(2, 2, 2),
    latent_channels=8,
    text_width=16,
    text_tokens=12,
    temporal=True,
    instance_latent=True,
    mean_over_frames=False,
)


def cond(batch: int, frames: int, slots: int, config: NetworkConfig) -> Conditions:
    """Of the right sizes."""
    views = len(config.neighbours)
    return Conditions(
        text=torch.randn(batch, config.text_tokens, config.text_width),
        text_mask=torch.ones(batch, config.text_tokens, dtype=torch.bool),
        cameras=torch.randn(batch, views, frames, 3, 7),
        ego_motion=torch.randn(batch, frames, 4, 4),
        box_corners=torch.randn(batch, views, frames, slots, 8, 3),
        box_classes=torch.zeros(batch, views, frames, slots, dtype=torch.long),
        box_masks=torch.ones(batch, views, frames, slots, dtype=torch.long),
        bev_map=torch.zeros(batch, frames, 16, 16, dtype=torch.uint8),
        height=torch.full((batch,), 224.0),
        width=torch.full((batch,), 400.0),
        fps=torch.full((batch,), 12.0),
        keep=torch.ones(batch, dtype=torch.bool),
        keep_frame=torch.ones(batch, frames, dtype=torch.bool),
        box_latent=torch.randn(batch, slots, config.width) if config.instance_latent else None,
    )


@pytest.mark.parametrize(
    ("config", "batch", "frames", "latents"),
    [
        (SIZES, 1, 9, (3, 14, 22)),
        (replace(SIZES, rays=4), 1, 9, (3, 14, 22)),
        (replace(SIZES, temporal=False, instance_latent=False, mean_over_frames=True), 2, 1, (1, 15, 23)),
    ],
)
def test_the_formula_is_what_the_network_does(
    config: NetworkConfig,
    batch: int,
    frames: int,
    latents: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a forward pass: torch counts neither what is fused on a CPU nor sums in place, as backward passes make.

    The formula leaves out small parts, and must not say more than there is.
    """
    monkeypatch.setattr("magicdrive_core.kernels.library.usable", lambda _: False)
    network = build_network(config).requires_grad_(False)
    x = torch.randn(batch, len(config.neighbours), config.latent_channels, *latents)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, torch.full((batch,), 500.0), cond(batch, frames, 5, config))
    forward = training_flops(config, batch, frames, latents, 5) / FORWARD_AND_BACKWARD
    assert 0.97 < forward / counter.get_total_flops() <= 1
