"""The published network: what only the released weights need, as overrides of the network's classes.

Each override names its oddity of the golden notes (section 6), and docs/decisions/0003 says why the network differs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from magicdrive_core.kernels.functions import modulate
from magicdrive_core.model.attention import Rotary
from magicdrive_core.model.blocks import Head, MultiViewBlock
from magicdrive_core.model.embedders import CameraEmbedder
from magicdrive_core.model.init import ZERO, initialise
from magicdrive_core.model.inputs import unpack_map
from magicdrive_core.model.transformer import MagicDrive

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Unconditional
    from magicdrive_core.model.config import NetworkConfig
    from magicdrive_core.model.inputs import Conditions


class PublishedRotary(Rotary):
    """Rotary angles from the frequencies of the state dict, rounded as they are there (oddities 5 and 6)."""

    def frequencies(self, device: torch.device) -> Tensor:
        """Reads the frequencies of the state dict; computes them before there are any.

        Args:
            device: where they are computed; unused once the state dict holds them.

        Returns:
            (d/2), fp32, radians a frame.
        """
        return self.freqs.detach().float() if hasattr(self, "freqs") else super().frequencies(device)


class PublishedMultiViewBlock(MultiViewBlock):
    """Cross-view attention is modulated by three scalars, the first entries of the first vector (oddity 1)."""

    def cross_view_modulation(self, modulation: Tensor) -> Tensor:
        """Adds three scalars to the block's own shift, scale and gate.

        Args:
            modulation: (B, T or 1, 6, C), the projected noise level; three entries of its first vector are used.

        Returns:
            (B, T or 1, 3, C): shift, scale, gate.
        """
        return self.scale_shift_table_mva + modulation[:, :, 0, :3, None]


class PublishedCameraEmbedder(CameraEmbedder):
    """Intrinsics enter sines and linear maps in pixels, about 1e3 (oddity 3)."""

    def in_units(self, cameras: Tensor) -> Tensor:
        """Leaves the intrinsics in pixels.

        Args:
            cameras: (..., 3, 7), intrinsics in pixels of the 1600x900 picture.

        Returns:
            ``cameras`` itself.
        """
        return cameras


class PublishedHead(Head):
    """Conditioning frames are normalised and modulated twice (oddity 13)."""

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
        x = modulate(x, *self.modulation(noisy[:, None]))
        if clean is not None and x_mask is not None:
            x = torch.where(x_mask[:, None, :, None, None], x, modulate(x, *self.modulation(clean[:, None])))
        return self.linear(x)


class PublishedMagicDrive(MagicDrive):
    """The network that released weights belong to.

    Args:
        config: sizes and variants.
    """

    multi_view_block = PublishedMultiViewBlock
    head = PublishedHead
    camera_embedding = PublishedCameraEmbedder
    unconditional: ClassVar[Unconditional] = "rflow"

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        for owner in (self, self.frame_embedder, self.bbox_embedder):
            owner.rope = PublishedRotary(owner.rope.width)

    def initialise(self) -> None:
        """The map starts at zero and loses its scale; fresh temporal blocks are no identity (oddity 10)."""
        initialise(self, (*ZERO, "before_proj"), map_scale=False)

    def grid(self, height: int, width: int, conditions: Conditions) -> tuple[int, int]:
        """Appends rows of patches until the parallel size divides the patches of a frame (oddity 8).

        Args:
            height: H, rows of latents.
            width: W, columns of latents.
            conditions: ``pad_patches`` is the parallel size; None: the configuration's, else the number of ranks.

        Returns:
            Rows and columns of patches.
        """
        rows, columns = super().grid(height, width, conditions)
        size = conditions.pad_patches or self.config.pad_patches or self.tokens.ranks
        return rows + (size - rows % size if rows * columns % size else 0), columns

    def text_tokens(self, conditions: Conditions) -> tuple[Tensor, None]:
        """Cuts the batch to the longest prompt and one token more, without an attention mask (oddity 4).

        Args:
            conditions: ``text``, ``text_mask`` and ``keep`` are read.

        Returns:
            (B, Lt, C), and None: all tokens are attended to.
        """
        text, mask, keep = conditions.text, conditions.text_mask, conditions.keep[:, None, None]
        null = self.y_embedder.y_embedding.to(text.dtype)[: text.shape[1]]
        tokens = self.y_embedder(torch.where(keep, text, null))
        longest = conditions.longest_text
        if longest is None:
            longest = int(mask.sum(dim=1).max())
        return tokens[:, : longest + 1], None

    def position(self, conditions: Conditions, grid: tuple[int, int]) -> Tensor:
        """Takes the first sample's size for the whole batch (oddity 8).

        Args:
            conditions: ``height`` and ``width`` of the first sample are read, pixels of the video.
            grid: rows and columns of patches.

        Returns:
            (1, rows * columns, C) in the dtype of the weights.
        """
        return super().position(replace(conditions, height=conditions.height[:1], width=conditions.width[:1]), grid)

    def visible_map(self, conditions: Conditions) -> Tensor:
        """Keeps the map where the other conditions are dropped (oddity 22).

        Args:
            conditions: ``bev_map`` is read.

        Returns:
            (B, F, layers, rows, columns) in the dtype of the weights.
        """
        return unpack_map(conditions.bev_map, self.config.map_layers, self.dtype)

    def resize_map(self, features: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
        """Resizes map features by the nearest feature instead of a mean.

        Args:
            features: (B, C, t, h, w).
            latent_shape: T, H, W of the latents.

        Returns:
            (B, C, T, H, W).
        """
        return functional.interpolate(features, size=latent_shape, mode="nearest")


def published_null(network: MagicDrive, conditions: Conditions, *, zero_map: bool = True) -> Conditions:
    """The unconditional state of the published sampler, which is not that of training (oddity 9).

    The null text is cut like the prompt, cameras and ego motion are unknown, and all boxes are absent instead of
    hidden.

    Args:
        network: holds the null text and the unknown poses.
        conditions: those that guidance leads to.
        zero_map: whether the map is empty, as the published test configurations want.

    Returns:
        The unconditional state, shaped like ``conditions``.
    """
    null_text = network.y_embedder.y_embedding[: conditions.text.shape[1]].to(conditions.text.dtype)
    ego_motion = conditions.ego_motion.clone()
    ego_motion[..., :3, :] = network.frame_embedder.uncond_cam
    return replace(
        conditions,
        text=null_text.expand_as(conditions.text),
        cameras=network.camera_embedder.uncond_cam.expand_as(conditions.cameras),
        ego_motion=ego_motion,
        box_masks=torch.zeros_like(conditions.box_masks),
        bev_map=torch.zeros_like(conditions.bev_map) if zero_map else conditions.bev_map,
    )
