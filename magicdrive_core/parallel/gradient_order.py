"""The order in which a backward pass produces the gradients, found out without computing anything.

The backward pass visits the blocks of the main and of the control branch in turn and the embedders last, which no list
of parameters shows. ZeRO-2 reduces and frees gradients as they arrive: in another order most of them would wait.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.func import functional_call

from magicdrive_core.model.inputs import blank_conditions
from magicdrive_core.model.transformer import MagicDrive

FRAMES, LATENT_SHAPE = 9, (3, 4, 4)  # of a video, so that what only videos use takes part


def arrival_order(network: MagicDrive) -> list[str]:
    """Finds the order of arrival, in a pass over a small video whose tensors have shapes but no contents.

    The order depends on the network alone: the graph of a pass is the same for clips of every size and length, with and
    without conditioning frames and activation checkpointing, but for the time embedding, which is among the last.

    Args:
        network: on any device; it is not changed.

    Returns:
        Names of all trainable parameters, those first whose gradient is complete first; those that the pass did not
        use come last.
    """
    meta = torch.device("meta")
    weights = {
        name: tensor.detach().to(meta).requires_grad_(tensor.requires_grad)
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    trained = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
    arrived: list[str] = []

    def note(name: str, _: torch.Tensor) -> None:
        arrived.append(name)

    for name, tensor in trained.items():
        tensor.register_post_accumulate_grad_hook(partial(note, name))
    config = network.config
    x = torch.zeros(1, len(config.neighbours), config.latent_channels, *LATENT_SHAPE, device=meta)
    conditions = blank_conditions(config, FRAMES, device=meta)
    with torch.enable_grad():
        functional_call(network, weights, (x, torch.zeros(1, device=meta), conditions)).sum().backward()
    return arrived + [name for name in reversed(trained) if name not in set(arrived)]
