"""Applies to a network all that is not its mathematics: sharing of tokens, compilation, checkpointing, slicing."""

from __future__ import annotations

from functools import partial

import torch

from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.activation_checkpointing import checkpoint_blocks
from magicdrive_core.parallel.sequence_parallel import GroupShard, RankGroup, share_tokens
from magicdrive_core.parallel.slicing import slice_network
from magicdrive_core.parallel.wrapping import unwrap, wrap


def parallelize(
    network: MagicDrive,
    *,
    sequence_group: RankGroup | None = None,
    slice_tokens: int | None = None,
    recompute_every: int = 0,
    compile_backend: str | None = None,
) -> None:
    """Applies techniques to ``network``, in place of those that an earlier call applied.

    Args:
        network: keeps its weights and their names.
        sequence_group: ranks that share the tokens of every frame; None: this rank has all of them.
        slice_tokens: without gradients a block works on at most so many tokens at a time; None: a number for the
            device; 0: on all.
        recompute_every: every n-th block is computed again in the backward pass instead of keeping its activations;
            0: none.
        compile_backend: ``torch.compile`` backend for the blocks, one graph for all of a kind; None: not compiled.
    """
    unwrap(network)
    if sequence_group is not None:
        share_tokens(network, sequence_group)
    if compile_backend:
        for block in network.blocks():
            wrap(block, "forward", partial(torch.compile, backend=compile_backend))
    if recompute_every:
        checkpoint_blocks(network, recompute_every)
    if slice_tokens != 0:
        slice_network(network, slice_tokens)


def sequence_group_of(network: MagicDrive) -> RankGroup | None:
    """Finds the ranks that ``parallelize`` made share the tokens of a network.

    Args:
        network: the network.

    Returns:
        The ranks; None: this rank has all tokens.
    """
    return network.tokens.group if isinstance(network.tokens, GroupShard) else None
