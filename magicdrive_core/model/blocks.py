"""The transformer blocks and the head. Golden notes, section 2, "Block" and "Head".

To try another block, write a subclass and name it in the class attribute ``multi_view_block`` of a subclass of
``MagicDrive`` (docs/tutorials/change-the-network.md). Tokens are (B, V, T, S, C): B samples, V views, T latent frames,
S tokens of a frame, C channels. A modulation is (B, T or 1, n, C): n vectors for a whole clip, or for each latent frame
where some frames are conditioning frames.
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
    """Reshapes modulation vectors so that each broadcasts against tokens (B, V, T, S, C).

    Args:
        modulation: (B, T or 1, n, C), n vectors.

    Returns:
        (n, B, 1, T or 1, 1, C).
    """
    return rearrange(modulation, "b t n c -> n b 1 t 1 c")


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear.

    Args:
        width: channels of the input.
        hidden: channels between the linear maps.
        out: channels of the output; None: ``width``.
    """

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP to each vector.

        Args:
            x: (..., width).

        Returns:
            (..., out).
        """
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class ModulatedMlp(Mlp):
    """The MLP of a block: Linear, GELU, Linear of LN(x) * (1 + scale) + shift."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """Applies the MLP to LN(x) * (1 + scale) + shift, LN without affine weights.

        Args:
            x: (..., C).
            shift: broadcastable against ``x``.
            scale: shaped like ``shift``.

        Returns:
            (..., C), to be gated and added to the tokens.
        """
        return modulated_mlp(x, shift, scale, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Block(nn.Module):
    """Self-attention, attention to the context and an MLP, each added to the tokens.

    Args:
        config: sizes of the network.

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
        """Computes attention among the tokens of a frame, or over the frames of a token position.

        Args:
            x: (B, V, T, S, C) tokens.
            shift: (B, 1, T or 1, 1, C), added after the layer norm.
            scale: shaped like ``shift``; the normed tokens are multiplied by 1 + scale.
            context: holds the rotary angles and the number of tokens of a frame.

        Returns:
            (B, V, T, S, C), before the gate.
        """
        raise NotImplementedError

    def across_views(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:  # noqa: ARG002
        """Adds cross-view attention, in the blocks that have it.

        Args:
            x: (B, V, T, S, C) tokens.
            modulation: (B, T or 1, 6, C), the projected noise level.
            context: holds the number of tokens of a frame.

        Returns:
            (B, V, T, S, C); ``x`` itself in a block without cross-view attention.
        """
        return x


class SpatialBlock(Block):
    """A block whose self-attention is among the S tokens of a frame of a view."""

    temporal = False
    attention = SpatialAttention

    def self_attention(self, x: Tensor, shift: Tensor, scale: Tensor, context: BlockContext) -> Tensor:
        """Computes attention among the tokens of each frame.

        Args:
            x: (B, V, T, S, C) tokens.
            shift: (B, 1, T or 1, 1, C), added after the layer norm.
            scale: shaped like ``shift``; the normed tokens are multiplied by 1 + scale.
            context: holds the number of tokens of a frame on all ranks.

        Returns:
            (B, V, T, S, C), before the gate.
        """
        return self.attn(x, shift, scale, context.frame_tokens)


class TemporalBlock(Block):
    """A block whose self-attention is among the T frames at a token position of a view."""

    temporal = True
    attention = TemporalAttention

    def self_attention(self, x: Tensor, shift: Tensor, scale: Tensor, context: BlockContext) -> Tensor:
        """Computes attention over the frames of each token position.

        Args:
            x: (B, V, T, S, C) tokens.
            shift: (B, 1, T or 1, 1, C), added after the layer norm.
            scale: shaped like ``shift``; the normed tokens are multiplied by 1 + scale.
            context: holds the rotary angles of the frames.

        Returns:
            (B, V, T, S, C), before the gate.
        """
        return self.attn(x, shift, scale, context.angles)


class MultiViewBlock(SpatialBlock):
    """A spatial block in which every view attends to its neighbours, between the context and the MLP.

    Args:
        config: sizes of the network; ``neighbours`` says which views each view attends to.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.scale_shift_table_mva = nn.Parameter(torch.randn(3, config.width) / config.width**0.5)
        self.cross_view_attn = CrossViewAttention(config.width, config.heads, config.neighbours)
        self.mva_proj = nn.Linear(config.width, config.width)

    def across_views(self, x: Tensor, modulation: Tensor, context: BlockContext) -> Tensor:
        """Adds attention of every view to its neighbours.

        Args:
            x: (B, V, T, S, C) tokens of all views.
            modulation: (B, T or 1, 6, C), the projected noise level.
            context: holds the number of tokens of a frame on all ranks.

        Returns:
            (B, V, T, S, C).
        """
        shift, scale, gate = per_token(self.cross_view_modulation(modulation))
        return x + self.mva_proj(gate * self.cross_view_attn(x, shift, scale, context.frame_tokens))

    def cross_view_modulation(self, modulation: Tensor) -> Tensor:
        """Computes shift, scale and gate of cross-view attention.

        Args:
            modulation: (B, T or 1, 6, C), the projected noise level; the first three vectors are used.

        Returns:
            (B, T or 1, 3, C): shift, scale, gate.
        """
        return self.scale_shift_table_mva + modulation[:, :, :3]


class ControlBlock(Block):
    """A block of the control branch, whose tokens are projected and added to those of the main branch.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.after_proj = nn.Linear(config.width, config.width)

    def add_skip(self, x: Tensor, control: Tensor) -> Tensor:
        """Adds the projected tokens of the control branch to those of the main branch.

        Args:
            x: (B, V, T, S, C) tokens of the main branch.
            control: (B, V, T, S, C) tokens of the control branch, after this block.

        Returns:
            (B, V, T, S, C).
        """
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
        """Computes shift and scale of the head's layer norm.

        Args:
            time: (B, T or 1, C) time vectors.

        Returns:
            (2, B, 1, T or 1, 1, C): shift and scale, each broadcastable against (B, V, T, S, C).
        """
        return per_token(self.scale_shift_table + time[:, :, None])
