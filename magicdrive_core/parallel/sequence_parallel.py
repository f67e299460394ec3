"""Sequence parallelism: the S tokens of every frame shared out among p ranks (Ulysses, Jacobs et al. 2023).

Each rank holds n = ceil(S / p) tokens of every frame of every view, one after the other, and all that a block does to
a token alone happens where the token is. Attention within a frame needs all of them: around it the ranks exchange
tokens for heads, so that each has all S tokens of h / p heads, and back. Attention to the context is wrapped in the
same way: no rank needs more than its own heads' keys and values of the context.

Where p does not divide S, the last shares are padded with zeros, at most p - 1 in all. No attention sees these and
they are cut off at the end, so that any number of ranks gives one result (docs/decisions/0004).

The collectives are differentiable as the linear maps that they are. With every rank's own loss L_r on its whole output,
gradients averaged over all ranks are therefore those of the mean of all L_r: no gradient is scaled by hand.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional

from magicdrive_core.model.blocks import MultiViewBlock
from magicdrive_core.model.context import TokenShard
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.wrapping import Call, wrap


class RankGroup:
    """The ranks of a process group, with differentiable collectives. All ranks make every call, in one order.

    Args:
        group: the process group, which holds this rank.

    Attributes:
        size: p, number of ranks.
        rank: index of this rank within the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Exchanges parts among the ranks: part i goes to rank i.

        Args:
            x: (p, ...), of the same shape on every rank.

        Returns:
            (p, ...): part i came from rank i.
        """
        return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), None, None, self._group))

    def all_gather(self, x: Tensor) -> Tensor:
        """Gives every rank's tensor to all ranks.

        Args:
            x: (...), of the same shape on every rank.

        Returns:
            (p, ...), in the order of the ranks.
        """
        return collectives.wait_tensor(collectives.all_gather_single(x.contiguous()[None], 0, self._group))


class GroupShard(TokenShard):
    """This rank's share of the tokens of a frame.

    Args:
        group: p ranks that share the tokens.
    """

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.ranks = group.size

    def shard(self, x: Tensor) -> Tensor:
        """Takes this rank's tokens; behind the last token of a frame they are zeros.

        Args:
            x: (..., frame tokens, C), all tokens of a frame.

        Returns:
            (..., n, C), n = ceil(frame tokens / p).
        """
        share = -(-x.shape[-2] // self.ranks)
        padded = functional.pad(x, (0, 0, 0, self.ranks * share - x.shape[-2]))
        return padded.narrow(-2, self.group.rank * share, share)

    def gather(self, x: Tensor, frame_tokens: int) -> Tensor:
        """Joins the tokens of all ranks and cuts the padding off.

        Args:
            x: (..., n, C), this rank's tokens.
            frame_tokens: number of tokens of a frame, without padding.

        Returns:
            (..., frame tokens, C).
        """
        return rearrange(self.group.all_gather(x), "p ... n c -> ... (p n) c")[..., :frame_tokens, :]


def share_tokens(network: MagicDrive, group: RankGroup) -> None:
    """Shares the tokens of every frame among the ranks of ``group``.

    Args:
        network: the network; its token shard and the inner attentions of its blocks are replaced.
        group: p ranks; p divides the network's heads.
    """
    network.tokens = GroupShard(group)
    for block in network.blocks():
        if not block.temporal:
            wrap(block.attn, "inner", partial(exchange_heads, group))
        if isinstance(block, MultiViewBlock):
            wrap(block.cross_view_attn, "inner", partial(exchange_heads, group))
        attention = block.cross_attn
        share = attention.heads // group.size
        attention.own_heads = slice(group.rank * share, (group.rank + 1) * share)
        wrap(attention, "inner", partial(exchange_query_heads, group))


def exchange_heads(group: RankGroup, inner: Call) -> Call:
    """Wraps attention of packed q, k, v: each rank computes h / p heads of all tokens.

    Args:
        group: p ranks.
        inner: maps (..., p * n, 3, h / p, d) to (..., p * n, h / p, d).

    Returns:
        A function that maps (..., n, 3, h, d) to (..., n, h, d).
    """

    def attend(packed: Tensor, *rest: Any) -> Tensor:
        sent = rearrange(packed, "... n qkv (p h) d -> p ... n qkv h d", p=group.size)
        packed = rearrange(group.all_to_all(sent), "p ... n qkv h d -> ... (p n) qkv h d")
        sent = rearrange(inner(packed, *rest), "... (p n) h d -> p ... n h d", p=group.size)
        return rearrange(group.all_to_all(sent), "p ... n h d -> ... n (p h) d")

    return attend


def exchange_query_heads(group: RankGroup, inner: Call) -> Call:
    """Wraps attention to the context, whose keys and values are of this rank's heads already.

    Args:
        group: p ranks.
        inner: maps q (..., p * n, h / p, d), the context's keys and values and their bias to (..., p * n, h / p, d).

    Returns:
        A function that maps q (..., n, h, d), the same keys and values and bias to (..., n, h, d).
    """

    def attend(q: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
        def packed_inner(packed: Tensor) -> Tensor:
            return inner(packed[..., 0, :, :], kv, bias)

        return exchange_heads(group, packed_inner)(q[..., None, :, :])

    return attend
