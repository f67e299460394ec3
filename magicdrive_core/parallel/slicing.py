"""Inference in slices: a block works on a few frames, or a few token positions, at a time.

All of a spatial block stays within a frame (of all views), all of a temporal block within a token position of a view.
So the activations of a block, which are many times its tokens, are bounded whatever the size and length of a clip, and
the result is that of all tokens at once. On a CPU small slices also stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from magicdrive_core.model.blocks import Block, ControlBlock
from magicdrive_core.model.context import ALL, BlockContext
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.wrapping import Call, wrap

CPU_TOKENS = 16384  # tokens of a slice, unless one frame of all views or one token position of a view has more
GPU_TOKENS = 65536

Slice = tuple[slice, slice, slice]  # of views, frames and tokens
WHOLE: Slice = (ALL, ALL, ALL)


def slice_network(network: MagicDrive, limit: int | None = None) -> None:
    """Makes blocks and head work in slices where no gradients are wanted. Blocks then write over their tokens.

    Args:
        network: the network; its blocks' ``forward`` is wrapped.
        limit: tokens of a slice; None: ``CPU_TOKENS`` or ``GPU_TOKENS``.
    """
    for block in network.blocks():
        wrap(block, "forward", partial(slice_block, block, limit))
        if isinstance(block, ControlBlock):
            wrap(block, "add_skip", partial(slice_skip, limit))
    wrap(network.final_layer, "forward", partial(slice_head, limit))


def slice_block(block: Block, limit: int | None, forward: Call) -> Call:
    """Wraps the ``forward`` of a block, so that without gradients it works in slices.

    Args:
        block: the block.
        limit: tokens of a slice; None: ``CPU_TOKENS`` or ``GPU_TOKENS``.
        forward: the block's present ``forward``.

    Returns:
        A function with the arguments of ``forward``; in several slices it writes over ``x`` and returns it.
    """

    def sliced(x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:
        parts = [WHOLE] if torch.is_grad_enabled() else list(slices(x, temporal=block.temporal, limit=limit))
        if parts == [WHOLE]:
            return forward(x, modulation, context)
        if context.kv is None:  # once for all slices
            context = replace(context, kv=block.cross_attn.keys_values(context.tokens.rows))
        for views, frames, tokens in parts:
            part = x[:, views, frames, tokens]
            by_frame = modulation[:, frames] if modulation.shape[1] > 1 else modulation
            part.copy_(forward(part, by_frame, context.part(views, frames)))
        return x

    return sliced


def slice_skip(limit: int | None, add_skip: Call) -> Call:
    """Wraps ``ControlBlock.add_skip``, so that without gradients it works in slices.

    Args:
        limit: tokens of a slice; None: ``CPU_TOKENS`` or ``GPU_TOKENS``.
        add_skip: the block's present ``add_skip``.

    Returns:
        A function with the arguments of ``add_skip``; in several slices it writes over ``x`` and returns it.
    """

    def sliced(x: Tensor, control: Tensor) -> Tensor:
        parts = [WHOLE] if torch.is_grad_enabled() else list(slices(x, temporal=False, limit=limit))
        if parts == [WHOLE]:
            return add_skip(x, control)
        for _, frames, _ in parts:
            x[:, :, frames] = add_skip(x[:, :, frames], control[:, :, frames])
        return x

    return sliced


def slice_head(limit: int | None, head: Call) -> Call:
    """Wraps the ``forward`` of the head, so that without gradients it works in slices.

    Args:
        limit: tokens of a slice; None: ``CPU_TOKENS`` or ``GPU_TOKENS``.
        head: the head's present ``forward``.

    Returns:
        A function with the arguments and the result of ``head``.
    """

    def sliced(x: Tensor, noisy: Tensor, clean: Tensor | None, x_mask: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return head(x, noisy, clean, x_mask)
        parts = [
            head(x[:, :, frames], noisy, clean, None if x_mask is None else x_mask[:, frames])
            for _, frames, _ in slices(x, temporal=False, limit=limit)
        ]
        return torch.cat(parts, dim=2)

    return sliced


def slices(x: Tensor, *, temporal: bool, limit: int | None) -> Iterator[Slice]:
    """Cuts tokens into the parts that a block may work on one after the other.

    Args:
        x: (B, V, T, S, C).
        temporal: whether the block attends over frames, else over the tokens and views of a frame.
        limit: tokens of a slice; None: ``CPU_TOKENS`` or ``GPU_TOKENS``.

    Yields:
        Slices of views, frames and tokens that together cover ``x``; ``WHOLE`` alone where ``x`` is within the limit.
    """
    batch, views, frames, tokens, _ = x.shape
    limit = limit or (CPU_TOKENS if x.device.type == "cpu" else GPU_TOKENS)
    if batch * views * frames * tokens <= limit:
        yield WHOLE
    elif not temporal:
        yield from ((ALL, some, ALL) for some in cut(frames, limit // (batch * views * tokens)))
    elif batch * frames * tokens <= limit:
        yield from ((some, ALL, ALL) for some in cut(views, limit // (batch * frames * tokens)))
    else:
        for view in cut(views, 1):
            yield from ((view, ALL, some) for some in cut(tokens, limit // (batch * frames)))


def cut(length: int, size: int) -> list[slice]:
    """Cuts a range into parts of one size; the last one may be shorter.

    Args:
        length: length of the range, which starts at 0.
        size: length of a part; less than 1 counts as 1.

    Returns:
        The parts in order.
    """
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
