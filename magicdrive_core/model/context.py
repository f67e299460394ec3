"""What denoising needs of the conditions: encoded once per clip, used at every noise level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

ALL = slice(None)


class TokenShard:
    """Which tokens of a frame this rank computes: all of them, unless sequence parallelism takes this one's place.

    Attributes:
        ranks: number of ranks that share the tokens.
    """

    ranks = 1

    def shard(self, x: Tensor) -> Tensor:
        """Takes this rank's tokens.

        Args:
            x: (..., frame tokens, C), all tokens of a frame.

        Returns:
            (..., S, C); without sequence parallelism ``x`` itself.
        """
        return x

    def gather(self, x: Tensor, frame_tokens: int) -> Tensor:  # noqa: ARG002
        """Joins the tokens of all ranks.

        Args:
            x: (..., S, C), this rank's tokens.
            frame_tokens: number of tokens of a frame on all ranks together.

        Returns:
            (..., frame tokens, C); without sequence parallelism ``x`` itself.
        """
        return x


@dataclass(frozen=True)
class ContextTokens:
    """The tokens that the latents attend to, each kept once although many frames and views share it.

    The sequence of one frame of one view is [ego motion, camera, text, boxes], of length L = 2 + Lt + N.

    Attributes:
        rows: (B, R, C) with R = T' + V + Lt + V*T'*N, T' context frames.
        views: V.
        frames: T'.
        text: Lt.
        slots: N.
        visible: (B, V, T', L) bool, False at tokens that stand for nothing; None: all are attended to.
    """

    rows: Tensor
    views: int
    frames: int
    text: int
    slots: int
    visible: Tensor | None

    @classmethod
    def join(
        cls, ego_motion: Tensor, cameras: Tensor, text: Tensor, boxes: Tensor, visible: Tensor | None
    ) -> ContextTokens:
        """Joins the tokens of all conditions.

        Args:
            ego_motion: (B, T', C).
            cameras: (B, V, C).
            text: (B, Lt, C).
            boxes: (B, V, T', N, C).
            visible: (B, V, T', L) bool, False at tokens that stand for nothing; None: all are attended to.

        Returns:
            The tokens as rows (B, R, C), in the order ego motion, cameras, text, boxes.
        """
        rows = torch.cat([ego_motion, cameras, text, rearrange(boxes, "b v t n c -> b (v t n) c")], dim=1)
        return cls(rows, cameras.shape[1], ego_motion.shape[1], text.shape[1], boxes.shape[3], visible)

    def by_frame(self, rows: Tensor, frames: int, views: slice = ALL, some: slice = ALL) -> Tensor:
        """Lays out what was computed from ``rows`` as one sequence for each frame of each view.

        Args:
            rows: (B, R, X).
            frames: T latent frames of the clip; T' context frames are resampled to them by nearest neighbour.
            views: the views that are wanted.
            some: the latent frames that are wanted.

        Returns:
            (B, V, T, L, X) of the wanted views and frames.
        """
        sizes = [self.frames, self.views, self.text, self.views * self.frames * self.slots]
        ego_motion, cameras, text, boxes = rows.split(sizes, dim=1)
        boxes = rearrange(boxes, "b (v t n) x -> b v t n x", v=self.views, t=self.frames)[:, views]
        boxes = self._resample(boxes, 2, frames, some)
        parts = [
            rearrange(self._resample(ego_motion, 1, frames, some), "b t x -> b 1 t 1 x"),
            rearrange(cameras[:, views], "b v x -> b v 1 1 x"),
            rearrange(text, "b l x -> b 1 1 l x"),
            boxes,
        ]
        return torch.cat([part.expand(*boxes.shape[:3], -1, -1) for part in parts], dim=3)

    def bias(self, frames: int, dtype: torch.dtype) -> Tensor | None:
        """Turns ``visible`` into what is added to attention scores.

        Args:
            frames: T latent frames of the clip; T' context frames are resampled to them by nearest neighbour.
            dtype: data type of the attention scores and of the result.

        Returns:
            (B, V, T, L): 0 where a token is visible, -inf elsewhere; None: all are visible.
        """
        if self.visible is None:
            return None
        visible = self._resample(self.visible, 2, frames, ALL)
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))

    def _resample(self, x: Tensor, dim: int, frames: int, some: slice) -> Tensor:
        """Takes ``some`` of T latent frames, after nearest resampling of the T' along ``dim``."""
        if frames == self.frames:
            start, stop, _ = some.indices(frames)
            return x.narrow(dim, start, stop - start)
        return x.index_select(dim, torch.arange(frames, device=x.device)[some] * self.frames // frames)


@dataclass(frozen=True)
class BlockContext:
    """What a block needs beside its tokens and the noise level; of some views and frames where it runs in slices.

    Attributes:
        tokens: the context tokens of the clip.
        kv: (B, R, 2c), the block's keys and values of ``tokens.rows``, computed once per clip; None: the block computes
            them, so that a checkpointed block keeps none of them.
        bias: (B, V, T, L), -inf at context tokens that stand for nothing; None: all are attended to.
        angles: (T, d/2, 2), rotary angles of all latent frames.
        frame_tokens: number of tokens of a frame, on all ranks together.
        views: the views of the slice.
        frames: the latent frames of the slice.
    """

    tokens: ContextTokens
    kv: Tensor | None
    bias: Tensor | None
    angles: Tensor
    frame_tokens: int
    views: slice
    frames: slice

    def by_frame(self, rows: Tensor) -> Tensor:
        """Lays out rows as one sequence for each frame of each view of the slice.

        Args:
            rows: (B, R, X), computed from ``tokens.rows``.

        Returns:
            (B, V, T, L, X) of the slice's views and frames.
        """
        return self.tokens.by_frame(rows, len(self.angles), self.views, self.frames)

    def part(self, views: slice, frames: slice) -> BlockContext:
        """Restricts the context to some views and latent frames.

        Args:
            views: the views, counted from the clip's first.
            frames: the latent frames, counted from the clip's first.

        Returns:
            The context of the slice; tokens, keys and values are shared with this one.
        """
        bias = None if self.bias is None else self.bias[:, views, frames]
        return replace(self, bias=bias, views=views, frames=frames)


@dataclass(frozen=True)
class Context:
    """Everything of a clip that does not depend on the noise level.

    Attributes:
        latent_shape: T, H, W.
        grid: rows and columns of patches.
        tokens: the context tokens.
        kv: keys and values (B, R, 2c) of ``tokens.rows`` for each block; empty: the blocks compute them.
        position: (B or 1, S, C), position embedding of this rank's tokens.
        control: (B, T, S, C), position and map tokens, added to the control branch.
        rays: (B, V, T, S, C), added to both branches; None for a network without rays.
        fps: (B, C), embedded frame rate.
        angles: (T, d/2, 2), rotary angles of the latent frames.
        bias: (B, V, T, L), -inf at context tokens that stand for nothing; None: all are attended to.
    """

    latent_shape: tuple[int, int, int]
    grid: tuple[int, int]
    tokens: ContextTokens
    kv: dict[nn.Module, Tensor]
    position: Tensor
    control: Tensor
    rays: Tensor | None
    fps: Tensor
    angles: Tensor
    bias: Tensor | None

    @property
    def frame_tokens(self) -> int:
        """Number of tokens of a frame, on all ranks together."""
        return self.grid[0] * self.grid[1]

    def of_block(self, block: nn.Module) -> BlockContext:
        """Selects what one block needs.

        Args:
            block: a block of the network.

        Returns:
            The context for all views and frames, with the block's keys and values where they were computed.
        """
        return BlockContext(self.tokens, self.kv.get(block), self.bias, self.angles, self.frame_tokens, ALL, ALL)
