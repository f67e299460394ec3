"""The transformer blocks. Golden notes (README of the reference data), section 2, "Block" and "Head".

Inside the network the tokens are a list of groups of views, (G, B, T, S, C) each: all steps but cross-view attention
are a view's own, and a group is chosen so small that its activations stay in a CPU's cache, or beside the weights on a
GPU, and so large that the number of calls does not matter.
A modulation is (B, T or 1, n, C): one for the whole clip, or one a latent frame where some frames are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from magicdrive_core.kernels.functions import modulate
from magicdrive_core.model.layers import (
    CrossAttention,
    CrossViewAttention,
    ModulatedMlp,
    SpatialAttention,
    TemporalAttention,
)
from magicdrive_core.parallel.sequence_parallel import Places

if TYPE_CHECKING:
    from magicdrive_core.model.config import NetworkConfig


@dataclass(frozen=True)
class Surroundings:
    """What every block of one pass shares beside its tokens and modulation. None: nothing to hide."""

    angles: Tensor  # T, d/2, 2: rotary angles of the latent frames
    context_bias: list[Tensor] | list[None]  # for each group G*B*T, L: -inf at context tokens that stand for nothing
    places: Places  # of a frame, S of which are this device's


def per_token(modulation: Tensor) -> tuple[Tensor, ...]:
    """(B, T or 1, n, C) -> n tensors (B, T or 1, 1, C) that broadcast against (G, B, T, S, C)."""
    return modulation[:, :, :, None].unbind(2)


class Block(nn.Module):
    """Self-attention, attention to the context, MLP, each added to the tokens.

    A spatial block attends among the S patches of a frame of a view, a temporal one among the T frames of a place.
    """

    def __init__(self, config: NetworkConfig, *, temporal: bool) -> None:
        super().__init__()
        width = config.width
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = (TemporalAttention if temporal else SpatialAttention)(width, config.heads)
        self.cross_attn = CrossAttention(width, config.heads)
        self.mlp = ModulatedMlp(width, config.mlp_ratio * width)

    def forward(self, groups: list[Tensor], modulation: Tensor, kv: list[Tensor], around: Surroundings) -> list[Tensor]:
        """Groups (G, B, T, S, C), in and out; modulation (B, T or 1, 6, C), kv for each group (G, B, T, L, 2c)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = per_token(self.scale_shift_table + modulation)
        along = around.angles if self.temporal else around.places
        attended = []
        for x, keys_values, bias in zip(groups, kv, around.context_bias, strict=True):
            x = torch.addcmul(x, gate1, self.attn(x, shift1, scale1, along))
            attended.append(x + self.cross_attn(x, keys_values, bias, around.places))
        attended = self.across_views(attended, modulation, around)
        return [torch.addcmul(x, gate2, self.mlp(x, shift2, scale2)) for x in attended]

    def across_views(self, groups: list[Tensor], modulation: Tensor, around: Surroundings) -> list[Tensor]:  # noqa: ARG002
        """Cross-view attention, in the blocks that have it."""
        return groups


class ViewBlock(Block):
    """A spatial block with attention of every view to its neighbours, between the context and the MLP."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, temporal=False)
        self.published = config.published
        self.scale_shift_table_mva = nn.Parameter(torch.randn(3, config.width) / config.width**0.5)
        self.cross_view_attn = CrossViewAttention(config.width, config.heads, config.neighbours)
        self.mva_proj = nn.Linear(config.width, config.width)

    def across_views(self, groups: list[Tensor], modulation: Tensor, around: Surroundings) -> list[Tensor]:
        # The published network adds three scalars, the first entries of the first vector (oddity 1).
        by_time = modulation[:, :, 0, :3, None] if self.published else modulation[:, :, :3]
        shift, scale, gate = per_token(self.scale_shift_table_mva + by_time)
        seen = self.cross_view_attn(groups, shift, scale, around.places)
        return [x + self.mva_proj(gate * other) for x, other in zip(groups, seen, strict=True)]


class ControlBlock(Block):
    """A block of the control branch: its tokens, and their projection that is added to the main branch."""

    def __init__(self, config: NetworkConfig, *, temporal: bool) -> None:
        super().__init__(config, temporal=temporal)
        self.after_proj = nn.Linear(config.width, config.width)

    def forward(  # type: ignore[override]
        self, groups: list[Tensor], modulation: Tensor, kv: list[Tensor], around: Surroundings
    ) -> tuple[list[Tensor], list[Tensor]]:
        groups = super().forward(groups, modulation, kv, around)
        return groups, [self.after_proj(x) for x in groups]


class Head(nn.Module):
    """Modulated layer norm and the linear map to the patches' velocities, ordered (row, column, channel)."""

    def __init__(self, width: int, outputs: int, published: bool) -> None:
        super().__init__()
        self.published = published
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, noisy: Tensor, clean: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """Velocities of the patches.

        Args:
            x: (..., B, T, S, C).
            noisy: (B, C), time vector of the noise level.
            clean: (B, C), time vector of noise level 0; None without given frames.
            x_mask: (B, T) bool, True = noisy.

        Returns:
            (..., B, T, S, patch^2 * channels).
        """
        if clean is None or x_mask is None:
            x = modulate(x, *self._vectors(noisy))
        elif self.published:  # normalises given frames twice (oddity 13)
            x = modulate(x, *self._vectors(noisy))
            x = torch.where(x_mask[:, :, None, None], x, modulate(x, *self._vectors(clean)))
        else:
            x = modulate(x, *self._vectors(torch.where(x_mask[..., None], noisy[:, None], clean[:, None])))
        return self.linear(x)

    def _vectors(self, time: Tensor) -> tuple[Tensor, ...]:
        time = time if time.ndim == 3 else time[:, None]
        return per_token(self.scale_shift_table + time[:, :, None])
