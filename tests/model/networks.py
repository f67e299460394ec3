"""Small networks and meaningless conditions for the tests of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import Conditions, pack_map
from magicdrive_core.model.transformer import MagicDrive


def config(**changes: Any) -> NetworkConfig:
    sizes: dict[str, Any] = {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "control_depth": 1,
        "ego_heads": 2,
        "box_heads": 2,
        "box_widths": (24, 16),
        "map_channels": (4, 6, 8),
        "latent_channels": 3,
        "text_width": 10,
        "text_tokens": 7,
        "temporal": True,
        "instance_latent": True,
        "mean_over_frames": False,
    }
    return NetworkConfig(**{**sizes, **changes})


def network(seed: int = 0, *, fresh: bool = False, **changes: Any) -> MagicDrive:
    """With random weights everywhere, or ``fresh`` ones as training starts with (many of them zero)."""
    torch.manual_seed(seed)
    made = build_network(config(**changes)).eval()
    if not fresh:
        for module in made.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
    return made


def conditions(batch: int = 1, frames: int = 9, slots: int = 3, views: int = 6, seed: int = 0) -> Conditions:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    lengths = whole(1, 7, batch, 1)
    return Conditions(
        text=normal(batch, 7, 10),
        text_mask=torch.arange(7)[None] < lengths,
        cameras=normal(batch, views, frames, 3, 7),
        ego_motion=normal(batch, frames, 4, 4),
        box_corners=normal(batch, views, frames, slots, 8, 3),
        box_classes=whole(0, 10, batch, views, frames, slots),
        box_masks=whole(-1, 2, batch, views, frames, slots),
        bev_map=pack_map(whole(0, 2, batch, frames, 8, 20, 20)),
        height=torch.full((batch,), 48.0),
        width=torch.full((batch,), 80.0),
        fps=torch.full((batch,), 12.0),
        keep=torch.ones(batch, dtype=torch.bool),
        keep_frame=whole(0, 4, batch, frames) > 0,
        box_latent=normal(batch, slots, 32),
    )


def noisy(batch: int = 1, latents: int = 3, size: tuple[int, int] = (5, 8), views: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, views, 3, latents, *size, generator=torch.Generator().manual_seed(seed))
