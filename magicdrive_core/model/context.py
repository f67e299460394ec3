"""What a pass over noisy latents needs of the conditions: encoded once a clip, used at every noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magicdrive_core.model.blocks import Surroundings


@dataclass(frozen=True)
class ContextTokens:
    """The tokens that the latents attend to, each kept once although many frames and views share it.

    The sequence of one frame of one view is [ego motion, camera, text, boxes], of length L = 2 + Lt + N.
    """

    distinct: Tensor  # B, R, C with R = T' + V + Lt + V*T'*N
    views: int
    frames: int  # T'
    text: int  # Lt
    slots: int  # N
    visible: Tensor | None  # V, B, T', L bool: what stands for something; None: attend to all (published)

    @classmethod
    def join(
        cls, ego_motion: Tensor, cameras: Tensor, text: Tensor, boxes: Tensor, visible: Tensor | None
    ) -> ContextTokens:
        """Of tokens (B, T', C), (V, B, C), (B, Lt, C), (V, B, T', N, C)."""
        rows = [ego_motion, cameras.transpose(0, 1), text, boxes.transpose(0, 1).flatten(1, 3)]
        return cls(
            torch.cat(rows, dim=1), cameras.shape[0], ego_motion.shape[1], text.shape[1], boxes.shape[3], visible
        )

    def spread(self, rows: Tensor, frames: int) -> Tensor:
        """What became of ``distinct`` (B, R, X), laid out for every view and latent frame: (V, B, T, L, X)."""
        sizes = [self.frames, self.views, self.text, self.views * self.frames * self.slots]
        ego_motion, cameras, text, boxes = rows.split(sizes, dim=1)
        shape = (self.views, len(rows), self.frames)
        parts = [
            ego_motion[None, :, :, None].expand(*shape, -1, -1),
            cameras.transpose(0, 1)[:, :, None, None].expand(*shape, -1, -1),
            text[None, :, None].expand(*shape, -1, -1),
            boxes.unflatten(1, (self.views, self.frames, self.slots)).transpose(0, 1),
        ]
        return self._over_latent_frames(torch.cat(parts, dim=3), frames)

    def bias(self, frames: int, dtype: torch.dtype, group: int) -> list[Tensor] | list[None]:
        """For each group of views (G*B*T, 1, 1, L): 0 where visible, -inf elsewhere."""
        if self.visible is None:
            return [None] * -(-self.views // group)
        visible = self._over_latent_frames(self.visible, frames)
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
        return [part.flatten(0, 2)[:, None, None] for part in bias.split(group)]

    def _over_latent_frames(self, x: Tensor, frames: int) -> Tensor:
        """Nearest resampling of the frames of (V, B, T', ...); a single one is used for all."""
        if frames == self.frames:
            return x
        if self.frames == 1:
            return x.expand(-1, -1, frames, *x.shape[3:])
        return x[:, :, torch.arange(frames, device=x.device) * self.frames // frames]


@dataclass(frozen=True)
class Context:
    """Everything of a clip that does not depend on the noise level."""

    latent_shape: tuple[int, int, int]  # T, H, W
    grid: tuple[int, int]  # rows and columns of patches, padding included
    views_at_once: int  # in a group
    tokens: ContextTokens
    kv: dict[str, list[Tensor]]  # by group of blocks: keys and values (B, R, 2C) of ``tokens.distinct``
    position: Tensor  # B or 1, S, C
    control: Tensor  # B, T, S, C: position and map, added to the control branch
    fps: Tensor  # B, C
    surroundings: Surroundings

    def keys_values(self, group: str, index: int) -> list[Tensor]:
        """For one block and each group of views (G, B, T, L, 2C)."""
        return list(self.tokens.spread(self.kv[group][index], self.latent_shape[0]).split(self.views_at_once))
