"""Applies everything that is not the network's mathematics to a network: sharing, slicing, checkpointing, compiling."""

from __future__ import annotations

from magicdrive_core.model.transformer import SLICE_TOKENS, MagicDrive
from magicdrive_core.parallel.sequence_parallel import OneDevice, RankGroup


def parallelize(
    network: MagicDrive,
    *,
    sequence_group: RankGroup | None = None,
    slice_tokens: int | None = SLICE_TOKENS,
    checkpoint_every: int = 0,
    compile_backend: str | None = None,
) -> None:
    """Applies the given techniques to ``network``, in place of those of an earlier call.

    Args:
        network: keeps its weights and their names.
        sequence_group: ranks that share the tokens of every frame; None: this rank has all of them.
        slice_tokens: without gradients a block works on at most so many tokens at a time; None: on all.
        checkpoint_every: every n-th block is computed again in the backward pass instead of keeping its activations;
            0: none.
        compile_backend: ``torch.compile`` backend for the blocks, one graph for all of a kind; None: not compiled.
    """
    network.devices = sequence_group or OneDevice()
    network.slice_tokens = slice_tokens
    network.checkpoint_blocks = checkpoint_every
    if compile_backend:
        network.compile_blocks(compile_backend)


def sequence_group_of(network: MagicDrive) -> RankGroup | None:
    """The ranks that ``parallelize`` made share the tokens of ``network``."""
    return network.devices if isinstance(network.devices, RankGroup) else None
