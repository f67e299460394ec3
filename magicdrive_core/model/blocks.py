"""The transformer blocks and the head. Golden notes, section 2, "Block" and "Head".

To try another block, change one class here. Tokens are (B, V, T, S, C): B samples, V views, T latent frames, S tokens
of a frame, C channels. A modulation is (B, T or 1, n, C): n vectors for a whole clip, or for each latent frame where
some frames are conditioning frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.kernels.functions import modulate, modulated_mlp
from magicdrive_core.model.attention import CrossAttention, CrossViewAttention, SpatialAttention, TemporalAttention

if TYPE_CHECKING:
    from magicdrive_core.model.config import NetworkConfig
    from magicdrive_core.model.context import BlockContext


def per_token(modulation: Tensor) -> Tensor:
    """Turns n vectors (B, T or 1, n, C) into (n, B, 1, T or 1, 1, C), each broadcastable against (B, V, T, S, C)."""
    return rearrange(modulation, "b t n c -> n b 1 t 1 c")


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to (..., out)."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class ModulatedMlp(Mlp):
    """The MLP of a block: Linear, GELU, Linear of LN(x) * (1 + scale) + shift."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """Maps (..., C) to the same shape; ``shift`` and ``scale`` broadcast against ``x``."""
        return modulated_mlp(x, shift, scale, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Self-attention, attention to the context and an MLP, each added to the tokens.

    Attributes:
        temporal: whether self-attention is over the frames of a token position, else over the tokens of a frame.
    """

    temporal: bool
    attention: type[SpatialAttention] | type[TemporalAttention]

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = self.attention(width, config.heads)
        self.cross_attn = CrossAttention(width, config.heads)
        self.mlp = ModulatedMlp(width, config.mlp_ratio * width)

    def forward(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:
        """Advances tokens by one block.

        Args:
            x: (B, V, T, S, C).
            modulation: (B, T or 1, 6, C), the projected noise level.
            context: what the tokens attend to.

        Returns:
            (B, V, T, S, C).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = per_token(self.scale_shift_table + modulation)
        x = torch.addcmul(x, gate1, self.self_attention(x, shift1, scale1, context))
        x = x + self.cross_attn(x, context)
        x = self.across_views(x, modulation, context)
        return torch.addcmul(x, gate2, self.mlp(x, shift2, scale2))

    def self_attention(self, x: Tensor, shift: Tensor, scale: Tensor, context: BlockContext) -> Tensor:
        """Attention among the tokens of a frame, or over the frames of a token position."""
        raise NotImplementedError

    def across_views(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:  # noqa: ARG002
        """Adds cross-view attention, in the blocks that have it."""
        return x


class SpatialBlock(Block):
    """A block whose self-attention is among the S tokens of a frame of a view."""

    temporal = False
    attention = SpatialAttention

    def self_attention(self, x: Tensor, shift: Tensor, scale: Tensor, context: BlockContext) -> Tensor:
        """Attention among the tokens of a frame."""
        return self.attn(x, shift, scale, context.frame_tokens)


class TemporalBlock(Block):
    """A block whose self-attention is among the T frames at a token position of a view."""

    temporal = True
    attention = TemporalAttention

    def self_attention(self, x: Tensor, shift: Tensor, scale: Tensor, context: BlockContext) -> Tensor:
        """Attention over the frames of a token position."""
        return self.attn(x, shift, scale, context.angles)


class MultiViewBlock(SpatialBlock):
    """A spatial block in which every view attends to its neighbours, between the context and the MLP."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.scale_shift_table_mva = nn.Parameter(torch.randn(3, config.width) / config.width**0.5)
        self.cross_view_attn = CrossViewAttention(config.width, config.heads, config.neighbours)
        self.mva_proj = nn.Linear(config.width, config.width)

    def across_views(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:
        """Adds attention of every view to its neighbours."""
        shift, scale, gate = per_token(self.cross_view_modulation(modulation))
        return x + self.mva_proj(gate * self.cross_view_attn(x, shift, scale, context.frame_tokens))

    def cross_view_modulation(self, modulation: Tensor) -> Tensor:
        """Shift, scale and gate of cross-view attention: (B, T or 1, 6, C) -> (B, T or 1, 3, C)."""
        return self.scale_shift_table_mva + modulation[:, :, :3]


class ControlBlock(Block):
    """A block of the control branch, whose tokens are projected and added to those of the main branch."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.after_proj = nn.Linear(config.width, config.width)

    def add_skip(self, x: Tensor, control: Tensor) -> Tensor:
        """Adds the projected tokens of the control branch to those of the main branch, (B, V, T, S, C) each."""
        return x + self.after_proj(control)


class SpatialControlBlock(ControlBlock, SpatialBlock):
    """A spatial block of the control branch, without cross-view attention."""


class TemporalControlBlock(ControlBlock, TemporalBlock):
    """A temporal block of the control branch."""


class Head(nn.Module):
    """Modulated layer norm and the linear map to the patches' velocities, ordered (row, column, channel).

    Args:
        width: C.
        outputs: numbers of a patch.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, noisy: Tensor, clean: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """Maps tokens to the velocities of their patches.

        Args:
            x: (B, V, T, S, C).
            noisy: (B, C), time vector of the noise level.
            clean: (B, C), time vector of noise level 0; None without conditioning frames.
            x_mask: (B, T) bool, True = noisy; None without conditioning frames.

        Returns:
            (B, V, T, S, patch^2 * channels).
        """
        time = noisy[:, None]
        if clean is not None and x_mask is not None:
            time = torch.where(x_mask[..., None], time, clean[:, None])
        return self.linear(modulate(x, *self.modulation(time)))

    def modulation(self, time: Tensor) -> Tensor:
        """Shift and scale of time vectors (B, T or 1, C): (2, B, 1, T or 1, 1, C)."""
        return per_token(self.scale_shift_table + time[:, :, None])
