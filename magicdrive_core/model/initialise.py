"""Initial weights: the model card's ``initialisation``, with fresh temporal blocks an identity unless published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from magicdrive_core.model.network import MagicDrive


@torch.no_grad()
def initialise(network: MagicDrive) -> None:
    """Draws the weights that differ from their module's own default, in the order of the state dict."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.controlnet_cond_patchifier.proj.weight.flatten(1))
    for embedder in (network.bbox_embedder, network.frame_embedder):
        nn.init.normal_(embedder.mlp.fc1.weight, std=0.02)
        nn.init.normal_(embedder.mlp.fc2.weight, std=0.02)
    nn.init.normal_(network.camera_embedder.emb2token.weight, std=0.02)
    for layer in _silent(network):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _silent(network: MagicDrive) -> Iterator[nn.Linear]:
    """The layers that start at zero.

    A fresh temporal block of the published network is no identity, since its MLP is not among them (oddity 10), and
    one of its control branch changes the branch's own tokens. Here both pass their tokens on unchanged.
    """
    yield network.before_proj
    yield from (network.bbox_embedder.final_proj, network.frame_embedder.final_proj)
    yield network.camera_embedder.after_proj
    for view_block in network.base_blocks_s:
        yield view_block.mva_proj
    for control_block in network.control_blocks_s:
        yield control_block.after_proj
    if not network.config.temporal:
        return
    for block in network.base_blocks_t:
        yield from (block.attn.proj, block.cross_attn.proj)
        if not network.config.published:
            yield block.mlp.fc2
    for control_block in network.control_blocks_t:
        yield control_block.after_proj
        if not network.config.published:
            yield from (control_block.attn.proj, control_block.cross_attn.proj, control_block.mlp.fc2)
