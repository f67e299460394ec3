"""Initial weights: the model card's ``initialisation``, with fresh temporal blocks an identity unless published."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from magicdrive_core.model.network import MagicDrive

ZERO = (
    "before_proj",
    "base_blocks_s.*.mva_proj",
    "base_blocks_t.*.attn.proj",
    "base_blocks_t.*.cross_attn.proj",
    "control_blocks_s.*.after_proj",
    "control_blocks_t.*.after_proj",
    "bbox_embedder.final_proj",
    "frame_embedder.final_proj",
    "camera_embedder.after_proj",
)
# A fresh temporal block of the published network is no identity, since its MLP is not among them (oddity 10), and one
# of its control branch changes the branch's own tokens. With these both pass their tokens on unchanged.
ZERO_FOR_IDENTITY = (
    "base_blocks_t.*.mlp.fc2",
    "control_blocks_t.*.attn.proj",
    "control_blocks_t.*.cross_attn.proj",
    "control_blocks_t.*.mlp.fc2",
)
SMALL = ("bbox_embedder.mlp.fc?", "frame_embedder.mlp.fc?", "camera_embedder.emb2token")


@torch.no_grad()
def initialise(network: MagicDrive) -> None:
    """Draws the weights whose distribution differs from their module's own default, in the state dict's order."""
    zero = ZERO if network.config.published else ZERO + ZERO_FOR_IDENTITY
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(fnmatchcase(name, pattern) for pattern in zero):
            nn.init.zeros_(module.weight)
        elif any(fnmatchcase(name, pattern) for pattern in SMALL):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.controlnet_cond_patchifier.proj.weight.flatten(1))
