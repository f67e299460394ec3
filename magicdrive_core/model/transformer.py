"""MagicDrive-V2's diffusion transformer. Formulas: golden notes (README of the reference data), section 2.

``forward`` is ``encode``, which computes once per clip all that does not depend on the noise level, and ``denoise``.
Letters: B samples, V views, T latent frames, H W latents, S tokens of a frame, L context length, C width.

The names of the modules are those of the published state dict. What only released weights need is in
``model/published``; slicing, sequence parallelism, activation checkpointing and compilation are applied from outside
(``parallel/parallelize.py``), and the step cache takes the place of ``trunk`` (``diffusion/step_cache.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.model.attention import Rotary
from magicdrive_core.model.blocks import (
    Block,
    ControlBlock,
    Head,
    MultiViewBlock,
    SpatialControlBlock,
    TemporalBlock,
    TemporalControlBlock,
)
from magicdrive_core.model.config import PATCH, NetworkConfig
from magicdrive_core.model.context import Context, ContextTokens, TokenShard
from magicdrive_core.model.embedders import (
    BoxEmbedder,
    CameraEmbedder,
    EgoMotionEmbedder,
    MapEncoder,
    MapReduction,
    PatchEmbedding,
    ScalarEmbedding,
    TextEmbedder,
    position_embedding,
)
from magicdrive_core.model.init import initialise
from magicdrive_core.model.inputs import unpack_map
from magicdrive_core.model.rays import RayEmbedder

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Unconditional
    from magicdrive_core.model.inputs import Conditions

# Without gradients the keys and values of all blocks are kept for a clip, unless they take more bytes than this: each
# pass then computes them again, at 1 % of its time.
KEPT_BYTES = 1 << 30
BASE_SIDE = 512  # pixels of a side of the square that positions are scaled to

Trunk = Callable[[Tensor, Tensor, Tensor, Context], Tensor]


class MagicDrive(nn.Module):
    """Velocity of the noisy latents of all views, conditioned on text, cameras, ego motion, boxes and BEV map.

    Args:
        config: sizes and variants; the weights are drawn from torch's generator.

    Attributes:
        config: sizes and variants.
        tokens: which tokens of a frame this rank computes.
        unconditional: the state that guidance leads away from, unless another one is chosen.
    """

    multi_view_block: ClassVar[type[MultiViewBlock]] = MultiViewBlock
    head: ClassVar[type[Head]] = Head
    camera_embedding: ClassVar[type[CameraEmbedder]] = CameraEmbedder
    unconditional: ClassVar[Unconditional] = "consistent"
    tokens: TokenShard = TokenShard()
    base_token: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.register_buffer("base_token", torch.randn(width))
        self.rope = Rotary(width // config.heads)
        self.x_embedder = PatchEmbedding(config.latent_channels, width, PATCH)
        self.t_embedder = ScalarEmbedding(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = TextEmbedder(config.text_width, width, config.text_tokens)
        self.fps_embedder = ScalarEmbedding(width)
        self.x_control_embedder = PatchEmbedding(config.latent_channels, width, PATCH)
        self.camera_embedder = self.camera_embedding(width)
        self.frame_embedder = EgoMotionEmbedder(width, config.ego_heads, config.mean_over_frames)
        self.bbox_embedder = BoxEmbedder(config)
        self.controlnet_cond_embedder = MapEncoder(config.map_layers, config.map_channels, width)
        self.controlnet_cond_embedder_temp = MapReduction(width)
        self.controlnet_cond_patchifier = PatchEmbedding(width, width, PATCH)
        if config.rays:
            self.ray_embedder = RayEmbedder(config)
        self.base_blocks_s = nn.ModuleList(self.multi_view_block(config) for _ in range(config.depth))
        self.before_proj = nn.Linear(width, width)
        self.control_blocks_s = nn.ModuleList(SpatialControlBlock(config) for _ in range(config.control_depth))
        if config.temporal:
            self.base_blocks_t = nn.ModuleList(TemporalBlock(config) for _ in range(config.depth))
            self.control_blocks_t = nn.ModuleList(
                TemporalControlBlock(config) for _ in range(config.control_depth * config.control_temporal)
            )
        self.final_layer = self.head(width, PATCH * PATCH * config.latent_channels)
        self.initialise()

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights, and so of the tokens."""
        return self.before_proj.weight.dtype

    def forward(self, x: Tensor, timestep: Tensor, conditions: Conditions, x_mask: Tensor | None = None) -> Tensor:
        """Computes the velocity x_0 - noise of noisy latents.

        Args:
            x: (B, V, latent channels, T, H, W) noisy latents; conditioning frames are clean.
            timestep: (B) noise level in [0, 1000], fp32.
            conditions: what the video is to show.
            x_mask: (B, T) bool, True = noisy, False = conditioning frame; None: all noisy.

        Returns:
            Like ``x``, in fp32.
        """
        return self.denoise(x, timestep, self.encode(conditions, tuple(x.shape[3:])), x_mask)

    def encode(self, conditions: Conditions, latent_shape: tuple[int, ...]) -> Context:
        """Computes all that does not depend on the noise level.

        Args:
            conditions: what the video is to show.
            latent_shape: T, H, W.

        Returns:
            What ``denoise`` needs of the clip at every noise level.
        """
        frames, height, width = latent_shape
        grid = self.grid(height, width, conditions)
        tokens = self.context_tokens(conditions)  # rows (B, R, C)
        position = self.tokens.shard(self.position(conditions, grid))  # (B or 1, S, C)
        map_tokens = self.map_tokens(conditions, (frames, height, width), grid)  # (B, T, S, C)
        return Context(
            latent_shape=(frames, height, width),
            grid=grid,
            tokens=tokens,
            kv=self.keys_values(tokens.rows),
            position=position,
            control=position[:, None] + self.before_proj(map_tokens),
            rays=self.ray_tokens(conditions, (frames, height, width), grid),
            fps=self.fps_embedder(conditions.fps),
            angles=self.rope(frames),
            bias=tokens.bias(frames, self.dtype),
        )

    def denoise(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        x_mask: Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Computes the velocity from encoded conditions.

        Args:
            x: (B, V, latent channels, T, H, W) noisy latents; conditioning frames are clean.
            timestep: (B) noise level in [0, 1000], fp32.
            context: the clip's encoded conditions, from ``encode``.
            x_mask: (B, T) bool, True = noisy, False = conditioning frame; None: all noisy.
            trunk: called in place of ``self.trunk``, with its arguments and result; None: ``self.trunk``.

        Returns:
            The velocity, shaped like ``x``, in fp32.
        """
        noisy = self.t_embedder(timestep) + context.fps  # (B, C)
        modulation = self.t_block(noisy)[:, None]  # (B, 1, 6C)
        clean = None
        if x_mask is not None:  # conditioning frames have noise level 0
            clean = self.t_embedder(torch.zeros_like(timestep)) + context.fps
            modulation = torch.where(x_mask[..., None], modulation, self.t_block(clean)[:, None])  # (B, T, 6C)
        modulation = rearrange(modulation, "b t (n c) -> b t n c", n=6)

        patches = self.tokens.shard(to_patches(x.to(self.dtype), context.grid[0]))  # (B, V, T, S, channels * p * p)
        main = self.x_embedder(patches) + context.position[:, None, None]  # (B, V, T, S, C)
        control = self.x_control_embedder(patches) + context.control[:, None]  # (B, V, T, S, C)
        if context.rays is not None:
            main, control = main + context.rays, control + context.rays
        main = (trunk or self.trunk)(main, control, modulation, context)
        velocities = self.tokens.gather(self.final_layer(main, noisy, clean, x_mask), context.frame_tokens)
        return from_patches(velocities, context.grid, context.latent_shape[1:]).float()

    def trunk(self, x: Tensor, control: Tensor, modulation: Tensor, context: Context) -> Tensor:
        """Passes the tokens through all blocks.

        Args:
            x: (B, V, T, S, C), tokens of the main branch.
            control: (B, V, T, S, C), tokens of the control branch.
            modulation: (B, T or 1, 6, C), the projected noise level.
            context: the clip's encoded conditions.

        Returns:
            (B, V, T, S, C), tokens of the main branch.
        """
        for base, control_block in self.layers():
            x = base(x, modulation, context.of_block(base))
            if control_block is not None:
                control = control_block(control, modulation, context.of_block(control_block))
                x = control_block.add_skip(x, control)
        return x

    def layers(self) -> Iterator[tuple[Block, ControlBlock | None]]:
        """Lists the blocks of the main branch, each with the control block beside it.

        Yields:
            A block and its control block, or None where there is none, in the order in which the tokens pass them.
        """
        for index in range(self.config.depth):
            for kind in ("s", "t") if self.config.temporal else ("s",):
                controls = getattr(self, f"control_blocks_{kind}")
                yield getattr(self, f"base_blocks_{kind}")[index], controls[index] if index < len(controls) else None

    def blocks(self) -> Iterator[Block]:
        """Lists all blocks of both branches.

        Yields:
            The blocks, in the order in which the tokens pass them.
        """
        for pair in self.layers():
            yield from (block for block in pair if block is not None)

    @torch.no_grad()
    def set_text_buffers(self, class_features: Tensor, base_feature: Tensor) -> None:
        """Computes the class table and the base token from text features.

        Both are buffers: made once, with the text projection of that moment (golden notes, oddity 11).

        Args:
            class_features: (K, D), of the class names.
            base_feature: (D), of the empty string.
        """
        self.bbox_embedder._class_tokens.copy_(self.y_embedder(class_features[None])[0])
        self.base_token.copy_(self.y_embedder(base_feature[None, None])[0, 0])

    def initialise(self) -> None:
        """Draws the weights whose distribution differs from their module's own default."""
        initialise(self)

    def grid(self, height: int, width: int, conditions: Conditions) -> tuple[int, int]:  # noqa: ARG002
        """Computes the grid of patches of latents.

        Args:
            height: H, rows of latents.
            width: W, columns of latents.
            conditions: unused; the published network reads ``pad_patches``.

        Returns:
            Rows and columns of patches; an incomplete patch counts.
        """
        return -(-height // PATCH), -(-width // PATCH)

    def context_tokens(self, conditions: Conditions) -> ContextTokens:
        """Embeds all conditions but the map.

        Args:
            conditions: what the video is to show.

        Returns:
            The context tokens, rows (B, R, C); dropped conditions are replaced by the vectors that stand for them.
        """
        keep = conditions.keep
        keep_frame = conditions.keep_frame & keep[:, None]
        text, text_visible = self.text_tokens(conditions)  # (B, Lt, C)
        states = torch.where(keep_frame[:, None, :, None] | (conditions.box_masks != 1), conditions.box_masks, -1)
        boxes = self.bbox_embedder(
            conditions.box_corners, conditions.box_classes, states, conditions.box_latent
        )  # (B, V, T', N, C)
        cameras = conditions.cameras[:, :, 0]
        cameras = self.camera_embedder(cameras, keep[:, None].expand(cameras.shape[:2]))  # (B, V, C)
        ego_motion = self.frame_embedder(conditions.ego_motion, keep_frame)  # (B, T', C)
        visible = None
        if text_visible is not None:
            present = self.bbox_embedder.present(states)
            always = present.new_ones(*present.shape[:3], 2)
            texts = text_visible[:, None, None].expand(*present.shape[:3], -1)
            visible = torch.cat([always, texts, present], dim=-1)
        base = self.base_token
        return ContextTokens.join(ego_motion + base, cameras + base, text, boxes + base, visible)

    def text_tokens(self, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """Embeds the text; a dropped one is replaced by the stored null text, all of it.

        Args:
            conditions: ``text``, ``text_mask`` and ``keep`` are read.

        Returns:
            (B, Lt, C), and a mask (B, Lt) bool of the tokens that are attended to; None: all.
        """
        text, mask, keep = conditions.text, conditions.text_mask, conditions.keep[:, None]
        null = self.y_embedder.y_embedding.to(text.dtype)
        missing = len(null) - text.shape[1]
        text, mask = functional.pad(text, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
        return self.y_embedder(torch.where(keep[..., None], text, null)), mask | ~keep

    def position(self, conditions: Conditions, grid: tuple[int, int]) -> Tensor:
        """Computes the position embedding of every patch, scaled by the size of the video.

        Args:
            conditions: ``height`` and ``width`` are read, pixels of each sample's video.
            grid: rows and columns of patches.

        Returns:
            (B, rows * columns, C) in the dtype of the weights.
        """
        scale = (conditions.height.float() * conditions.width.float()).sqrt() / BASE_SIDE
        return position_embedding(grid, scale, round((grid[0] * grid[1]) ** 0.5), self.config.width).to(self.dtype)

    def map_tokens(self, conditions: Conditions, latent_shape: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
        """Embeds the BEV map as tokens, the same for all views.

        Args:
            conditions: ``bev_map`` and ``keep`` are read.
            latent_shape: T, H, W of the latents, to which the map's features are resized.
            grid: rows and columns of patches.

        Returns:
            (B, T, S, C), this rank's tokens.
        """
        bev_map = self.visible_map(conditions)
        batch = len(bev_map)
        features = self.controlnet_cond_embedder(rearrange(bev_map, "b f k h w -> (b f) k h w"))
        features = self.controlnet_cond_embedder_temp(rearrange(features, "(b f) c h w -> b f c h w", b=batch))
        features = rearrange(features, "b t c h w -> b c t h w")
        if features.shape[2:] != latent_shape:
            features = self.resize_map(features, latent_shape)
        return self.controlnet_cond_patchifier(self.tokens.shard(to_patches(features, grid[0])))

    def ray_tokens(
        self, conditions: Conditions, latent_shape: tuple[int, int, int], grid: tuple[int, int]
    ) -> Tensor | None:
        """Embeds what the rays of each view meet.

        Args:
            conditions: cameras, boxes, map and size of the video are read.
            latent_shape: T, H, W of the latents.
            grid: rows and columns of patches.

        Returns:
            (B, V, T, S, C), this rank's tokens; None for a network without rays.
        """
        return self.ray_embedder(conditions, latent_shape, grid, self.tokens) if self.config.rays else None

    def visible_map(self, conditions: Conditions) -> Tensor:
        """Selects the BEV map that the network sees: an empty one where the conditions are dropped.

        Args:
            conditions: ``bev_map`` and ``keep`` are read.

        Returns:
            (B, F, layers, rows, columns) in the dtype of the weights.
        """
        bits = conditions.bev_map * conditions.keep[:, None, None, None]  # before they are unpacked to 1 GB
        return unpack_map(bits, self.config.map_layers, self.dtype)

    def resize_map(self, features: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
        """Resizes map features to the latents' grid by means over what a latent covers (decision 0009).

        Args:
            features: (B, C, t, h, w).
            latent_shape: T, H, W of the latents.

        Returns:
            (B, C, T, H, W).
        """
        return functional.interpolate(features, size=latent_shape, mode="area")

    def keys_values(self, rows: Tensor) -> dict[nn.Module, Tensor]:
        """Computes the keys and values of all blocks once per clip.

        With gradients there are none: a block then computes its own, so that a checkpointed one keeps nothing but its
        tokens, and the gradients of ``kv_linear`` arrive with the others of its block.

        Args:
            rows: (B, R, C), ``ContextTokens.rows``.

        Returns:
            (B, R, 2c) by block; empty with gradients, or where they would take more than ``KEPT_BYTES``.
        """
        taken = sum(1 for _ in self.blocks()) * 2 * rows.nbytes // self.tokens.ranks
        if torch.is_grad_enabled() or taken > KEPT_BYTES:
            return {}
        return {block: block.cross_attn.keys_values(rows) for block in self.blocks()}


def to_patches(x: Tensor, rows: int) -> Tensor:
    """Cuts frames into patches, with zeros appended where the size is too small.

    Args:
        x: (..., C, T, H, W).
        rows: rows of patches.

    Returns:
        (..., T, rows * columns, C * p * p).
    """
    height, width = x.shape[-2:]
    x = functional.pad(x, (0, width % PATCH, 0, rows * PATCH - height))
    return rearrange(x, "... c t (h p) (w q) -> ... t (h w) (c p q)", p=PATCH, q=PATCH)


def from_patches(patches: Tensor, grid: tuple[int, int], size: tuple[int, ...]) -> Tensor:
    """Joins patches to frames, with the appended rows and columns cut off.

    Args:
        patches: (B, V, T, rows * columns, p * p * C).
        grid: rows and columns of patches.
        size: H, W.

    Returns:
        (B, V, C, T, H, W).
    """
    pattern = "b v t (h w) (p q c) -> b v c t (h p) (w q)"
    return rearrange(patches, pattern, h=grid[0], p=PATCH, q=PATCH)[..., : size[0], : size[1]]
