"""The attention modules of a block: within a frame, over time, to the context, and across views.

Each makes queries, keys and values, calls its ``inner`` attention, which has no weights, and projects the result.
Sequence parallelism exchanges tokens for heads around ``inner`` (``parallel/sequence_parallel.py``); nothing else in
here knows of it. Formulas: golden notes, section 2, "Block".

Shapes: B samples, V views, T latent frames, S tokens of a frame (on this rank), C = h * d channels of h heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.kernels.functions import attend_context, attend_neighbours, attend_packed, modulated_linear

if TYPE_CHECKING:
    from magicdrive_core.model.context import BlockContext

ROTARY_BASE = 10000.0


class HeadNorm(nn.Module):
    """The weight of an RMS norm over the channels of a head; the inner attention applies it.

    Args:
        width: d, channels of a head.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Rotary(nn.Module):
    """Angles of the rotary position embedding: frame p turns the channel pair (2k, 2k+1) by p * 10000^(-2k/d).

    Su et al., "RoFormer" (2021), section 3.4. The angles come from the formula in fp32, whatever the dtype of the
    network. ``freqs`` is a parameter by name only, as the published state dict lists it: never trained, not read here.

    Args:
        width: d, channels of a head.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.freqs = nn.Parameter(self.frequencies(torch.get_default_device()), requires_grad=False)

    def frequencies(self, device: torch.device) -> Tensor:
        """Computes the rotary frequencies 10000^(-2k/d), k < d/2 (Su et al. 2021, section 3.4).

        Args:
            device: where the result is computed.

        Returns:
            (d/2), fp32, radians a frame.
        """
        k = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        return ROTARY_BASE ** (-k / self.width)

    def forward(self, length: int) -> Tensor:
        """Computes the cosine and sine of every frame's angles.

        Args:
            length: T, number of latent frames.

        Returns:
            (T, d/2, 2), fp32: cosine, then sine.
        """
        freqs = self.frequencies(self.freqs.device)
        angles = torch.arange(length, device=freqs.device, dtype=torch.float32)[:, None] * freqs
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    """Queries, keys and values of modulated tokens, with an RMS norm on q and k, and the output projection.

    Args:
        width: C.
        heads: h.
        qkv_bias: whether their linear map has a bias.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = HeadNorm(width // heads)
        self.k_norm = HeadNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def packed(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Computes q, k and v of LN(x) * (1 + scale) + shift, before their norm.

        Args:
            x: (..., C).
            shift: broadcastable against ``x``.
            scale: broadcastable against ``x``.

        Returns:
            (..., 3, h, d).
        """
        packed = modulated_linear(x, shift, scale, self.qkv.weight, self.qkv.bias)
        return rearrange(packed, "... (qkv h d) -> ... qkv h d", qkv=3, h=self.heads)

    @property
    def norm(self) -> Tensor:
        """Weights of the RMS norms of q and k, stacked: (2, d)."""
        return torch.stack([self.q_norm.weight, self.k_norm.weight])


class SpatialAttention(SelfAttention):
    """Attention among the tokens of every frame of every view."""

    inner = staticmethod(attend_packed)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int) -> Tensor:
        """Lets the tokens of each frame of each view attend to one another.

        Args:
            x: (B, V, T, S, C) tokens.
            shift: (B, 1, T or 1, 1, C), added after the layer norm.
            scale: shaped like ``shift``; the normed tokens are multiplied by 1 + scale.
            frame_tokens: number of tokens of a frame on all ranks; padding behind them is not attended to.

        Returns:
            (B, V, T, S, C), before the gate.
        """
        packed = rearrange(self.packed(x, shift, scale), "b v t s qkv h d -> 1 (b v t) s qkv h d")
        seen = self.inner(packed, self.norm, frame_tokens)
        return self.proj(rearrange(seen, "1 r s h d -> r s (h d)")).view(x.shape)


class TemporalAttention(SelfAttention):
    """Attention among the T frames at every token position, with rotary embedding."""

    inner = staticmethod(attend_packed)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
        """Lets the frames at each token position attend to one another.

        Args:
            x: (..., T, S, C) tokens.
            shift: broadcastable against ``x``, added after the layer norm.
            scale: shaped like ``shift``; the normed tokens are multiplied by 1 + scale.
            angles: (T, d/2, 2), cosines and sines from ``Rotary``.

        Returns:
            (..., T, S, C), before the gate.
        """
        packed = rearrange(self.packed(x, shift, scale), "... t s qkv h d -> (...) s t qkv h d")
        seen = self.inner(packed, self.norm, x.shape[-3], angles)
        return self.proj(rearrange(seen, "r s t h d -> r t s (h d)")).view(x.shape)


class CrossViewAttention(SelfAttention):
    """Attention of every view to its neighbours in the same frame, summed over the neighbours.

    Args:
        width: C.
        heads: h.
        neighbours: the views that each view attends to, equally many of each.
    """

    inner = staticmethod(attend_neighbours)

    def __init__(self, width: int, heads: int, neighbours: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(width, heads, qkv_bias=False)
        self.neighbours = neighbours

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, frame_tokens: int) -> Tensor:
        """Lets each view attend to its neighbours in the same frame, and sums over the neighbours.

        The projection's bias counts once for each neighbour (golden notes, oddity 7).

        Args:
            x: (B, V, T, S, C) tokens.
            shift: (B, 1, T or 1, 1, C), added after the layer norm.
            scale: shaped like ``shift``; the normed tokens are multiplied by 1 + scale.
            frame_tokens: number of tokens of a frame on all ranks; padding behind them is not attended to.

        Returns:
            (B, V, T, S, C), to be gated and projected by the block.
        """
        seen = self.inner(self.packed(x, shift, scale), self.norm, frame_tokens, self.neighbours)
        bias = self.proj.bias * len(self.neighbours[0])
        return functional.linear(rearrange(seen, "b v t s h d -> b v t s (h d)"), self.proj.weight, bias)


class CrossAttention(nn.Module):
    """Attention of every token to the context of its frame.

    Args:
        width: C.
        heads: h.

    Attributes:
        own_heads: the heads whose keys and values are computed here; sequence parallelism chooses a rank's share.
    """

    inner = staticmethod(attend_context)
    own_heads = slice(None)

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, rows: Tensor) -> Tensor:
        """Computes keys and values of context tokens, which do not depend on the noise level.

        Args:
            rows: (B, R, C), ``ContextTokens.rows``.

        Returns:
            (B, R, 2c), c the channels of this rank's own heads.
        """
        weight, bias = (
            rearrange(part, "(kv h d) ... -> kv h d ...", kv=2, h=self.heads)[:, self.own_heads].flatten(0, 2)
            for part in (self.kv_linear.weight, self.kv_linear.bias)
        )
        return functional.linear(rows, weight, bias)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Lets every token attend to the context sequence of its frame and view.

        Args:
            x: (B, V, T, S, C) tokens.
            context: the context tokens, with or without their keys and values; its views and frames are those of ``x``.

        Returns:
            (B, V, T, S, C), to be added to the tokens.
        """
        rows = self.keys_values(context.tokens.rows) if context.kv is None else context.kv
        q = rearrange(self.q_linear(x), "b v t s (h d) -> (b v t) s h d", h=self.heads)
        kv = rearrange(context.by_frame(rows), "b v t l (kv h d) -> (b v t) l kv h d", kv=2, d=q.shape[-1])
        bias = None if context.bias is None else rearrange(context.bias, "b v t l -> (b v t) l")
        seen = self.inner(q, kv, bias)
        return self.proj(rearrange(seen, "r s h d -> r s (h d)")).view(x.shape)
