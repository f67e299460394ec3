"""Activation checkpointing: a block keeps only its input for the backward pass, and is computed again there.

Chen et al., "Training deep nets with sublinear memory cost" (2016). Keys and values of the context are computed inside
the block, so that nothing but the tokens between the blocks is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.wrapping import wrap


def checkpoint_blocks(network: MagicDrive, every: int) -> None:
    """Computes every n-th layer of each kind of block again in the backward pass, from the first one on.

    Args:
        network: the network; the ``forward`` of these blocks is wrapped.
        every: n.
    """
    for index, pair in enumerate(network.layers()):
        layer = index // 2 if network.config.temporal else index
        for block in pair:
            if block is not None and layer % every == 0:
                wrap(block, "forward", _checkpointed)


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(forward, *arguments, use_reentrant=False)
        return forward(*arguments)

    return run
