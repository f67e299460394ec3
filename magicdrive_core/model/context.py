"""What a pass over noisy latents needs of the conditions: encoded once a clip, used at every noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from magicdrive_core.model.blocks import Surroundings
from magicdrive_core.parallel.sequence_parallel import Places
from magicdrive_core.parallel.slicing import ALL


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

    def spread(self, rows: Tensor, frames: int, views: slice = ALL, some: slice = ALL) -> Tensor:
        """What became of ``distinct`` (B, R, X), laid out for ``views`` and ``some`` latent frames: (V, B, T, L, X)."""
        sizes = [self.frames, self.views, self.text, self.views * self.frames * self.slots]
        ego_motion, cameras, text, boxes = rows.split(sizes, dim=1)
        boxes = boxes.unflatten(1, (self.views, self.frames, self.slots)).transpose(0, 1)[views]
        boxes = self._of_latent_frames(boxes, 2, frames, some)
        parts = [
            self._of_latent_frames(ego_motion, 1, frames, some)[None, :, :, None],
            cameras.transpose(0, 1)[views][:, :, None, None],
            text[None, :, None],
            boxes,
        ]
        return torch.cat([part.expand(*boxes.shape[:3], -1, -1) for part in parts], dim=3)

    def bias(self, frames: int, dtype: torch.dtype) -> Tensor | None:
        """(V, B, T, L): 0 where visible, -inf elsewhere."""
        if self.visible is None:
            return None
        visible = self._of_latent_frames(self.visible, 2, frames, ALL)
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))

    def _of_latent_frames(self, x: Tensor, dim: int, frames: int, some: slice) -> Tensor:
        """``some`` of T latent frames, after nearest resampling of the T' along ``dim``."""
        if frames == self.frames:
            start, stop, _ = some.indices(frames)
            return x.narrow(dim, start, stop - start)
        return x.index_select(dim, torch.arange(frames, device=x.device)[some] * self.frames // frames)


@dataclass(frozen=True)
class Context:
    """Everything of a clip that does not depend on the noise level."""

    latent_shape: tuple[int, int, int]  # T, H, W
    grid: tuple[int, int]  # rows and columns of patches, the published network's padding included
    places: Places  # of a frame, rows * columns; S of them are this device's
    views_at_once: int  # in a group
    tokens: ContextTokens
    kv: dict[str, list[Tensor]]  # by name of blocks: keys and values (B, R, 2c) of ``tokens.distinct``; or empty
    position: Tensor  # B or 1, S, C
    control: Tensor  # B, T, S, C: position and map, added to the control branch
    fps: Tensor  # B, C
    angles: Tensor  # T, d/2, 2: rotary angles of the latent frames
    context_bias: Tensor | None  # V, B, T, L: -inf at context tokens that stand for nothing; None: nothing to hide

    def keys_values(self, rows: Tensor, groups: slice, frames: slice) -> list[Tensor]:
        """A block's keys and values (B, R, 2c), for each of ``groups`` of views (G, B, T, L, 2c)."""
        laid_out = self.tokens.spread(rows, self.latent_shape[0], self._views(groups), frames)
        return list(laid_out.split(self.views_at_once))

    def surroundings(self, groups: slice, frames: slice) -> Surroundings:
        """What a block shares with others that work on the same groups and frames."""
        if self.context_bias is None:
            hidden: list[Tensor] | list[None] = [None] * len(range(-(-self.tokens.views // self.views_at_once))[groups])
        else:
            parts = self.context_bias[self._views(groups), :, frames].split(self.views_at_once)
            hidden = [part.flatten(0, 2) for part in parts]
        return Surroundings(self.angles, hidden, self.places)

    def _views(self, groups: slice) -> slice:
        start, stop, _ = groups.indices(self.tokens.views)
        return slice(start * self.views_at_once, stop * self.views_at_once)
