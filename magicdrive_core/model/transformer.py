"""MagicDrive-V2's diffusion transformer. Golden notes (README of the reference data), section 2; names and shapes of
the state dict: the model card beside them.

Two halves: ``encode`` computes once a clip all that does not depend on the noise level, ``denoise`` the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from magicdrive_core.model.blocks import Block, ControlBlock, Head, ViewBlock
from magicdrive_core.model.config import PATCH, NetworkConfig
from magicdrive_core.model.context import Context, ContextTokens
from magicdrive_core.model.embedders import (
    BoxEmbedder,
    CameraEmbedder,
    EgoMotionEmbedder,
    MapEncoder,
    MapReduction,
    TextEmbedder,
)
from magicdrive_core.model.init import initialise
from magicdrive_core.model.layers import PatchEmbedding, Rotary, ScalarEmbedding, position_embedding
from magicdrive_core.parallel.sequence_parallel import OneDevice, Places
from magicdrive_core.parallel.slicing import cut, slices

if TYPE_CHECKING:
    from magicdrive_core.diffusion.step_cache import StepCache
    from magicdrive_core.model.inputs import Conditions

TOKENS_AT_ONCE = {"cpu": 16384, "gpu": 65536}  # in a group of views, unless one view has more
SLICE_TOKENS = 65536
KEPT_BYTES = (
    1 << 30
)  # of all blocks' keys and values of a context: more are made again by each pass, at 1 % of its time
BASE_PIXELS = 512  # positions are scaled to a square of this many pixels


class MagicDrive(nn.Module):
    """The network: velocity of noisy latents of all views under text, cameras, ego motion, boxes and BEV map.

    Attributes:
        checkpoint_blocks: every n-th block is computed again in the backward pass instead of keeping its activations;
            0: none.
        slice_tokens: without gradients a block works on at most so many tokens at a time; None: on all.
        devices: that share the places of every frame; each of them runs the network with the same inputs.
    """

    base_token: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = 0
        self.slice_tokens: int | None = SLICE_TOKENS
        self.devices = OneDevice()
        width, published = config.width, config.published
        self.register_buffer("base_token", torch.randn(width))
        self.rope = Rotary(width // config.heads, published)
        self.x_embedder = PatchEmbedding(config.latent_channels, width, PATCH)
        self.t_embedder = ScalarEmbedding(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = TextEmbedder(config.text_width, width, config.text_tokens)
        self.fps_embedder = ScalarEmbedding(width)
        self.x_control_embedder = PatchEmbedding(config.latent_channels, width, PATCH)
        self.camera_embedder = CameraEmbedder(width, published)
        self.frame_embedder = EgoMotionEmbedder(width, config.ego_heads, config.mean_over_frames, published)
        self.bbox_embedder = BoxEmbedder(
            width,
            config.box_heads,
            config.mean_over_frames,
            published,
            classes=config.classes,
            class_width=config.class_width or width,
            widths=config.box_widths,
            instance_latent=config.instance_latent,
        )
        self.controlnet_cond_embedder = MapEncoder(config.map_layers, config.map_channels, width)
        self.controlnet_cond_embedder_temp = MapReduction(width)
        self.controlnet_cond_patchifier = PatchEmbedding(width, width, PATCH)
        self.base_blocks_s = nn.ModuleList(ViewBlock(config) for _ in range(config.depth))
        self.before_proj = nn.Linear(width, width)
        self.control_blocks_s = nn.ModuleList(ControlBlock(config, temporal=False) for _ in range(config.control_depth))
        if config.temporal:
            self.base_blocks_t = nn.ModuleList(Block(config, temporal=True) for _ in range(config.depth))
            self.control_blocks_t = nn.ModuleList(
                ControlBlock(config, temporal=True) for _ in range(config.control_depth * config.control_temporal)
            )
        self.final_layer = Head(width, PATCH * PATCH * config.latent_channels, published)
        initialise(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the tokens."""
        return self.before_proj.weight.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity x_0 - noise of noisy latents.

        Args:
            x: (B, V, C, T, H, W) noisy latents; given frames are clean.
            timestep: (B) noise level in [0, 1000], fp32.
            conditions: what to show.
            x_mask: (B, T) bool, True = noisy, False = given; None: all noisy.

        Returns:
            (B, V, C, T, H, W) in fp32.
        """
        return self.denoise(x, timestep, self.encode(conditions, tuple(x.shape[3:])), x_mask)

    def encode(self, conditions: Conditions, latent_shape: tuple[int, ...]) -> Context:
        """All that does not depend on the noise level, for latents of ``latent_shape`` (T, H, W).

        Context tokens, keys and values of every cross-attention, position embedding, map features.
        """
        frames, height, width = latent_shape
        grid = self._grid(height, width, conditions.pad_patches)
        places = self.devices.places(grid[0] * grid[1])
        tokens = self._context_tokens(conditions)
        position = places.own(self._position(conditions, grid))
        map_tokens = self._map_tokens(conditions, (frames, height, width), grid[0], places)
        return Context(
            latent_shape=(frames, height, width),
            grid=grid,
            places=places,
            views_at_once=self._views_at_once(tokens.views, len(conditions.text) * frames * position.shape[1]),
            tokens=tokens,
            kv=self._keys_values(tokens.distinct, places),
            position=position,
            control=position[:, None] + self.before_proj(map_tokens),
            fps=self.fps_embedder(conditions.fps),
            angles=self.rope(frames),
            context_bias=tokens.bias(frames, self.dtype),
        )

    def denoise(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        x_mask: Tensor | None = None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """``forward`` with the conditions encoded before; shapes and dtypes as there. ``cache``: see ``StepCache``."""
        patches = context.places.own(to_patches(x.transpose(0, 1).to(self.dtype), context.grid[0]))
        groups = patches.split(context.views_at_once)

        def embedded() -> list[Tensor]:
            return [self.x_embedder(x) + context.position[:, None] for x in groups]

        main = embedded()
        limit = None if torch.is_grad_enabled() else self.slice_tokens
        noisy = self.t_embedder(timestep) + context.fps
        modulation, clean = self.t_block(noisy)[:, None], None
        if x_mask is not None:
            clean = self.t_embedder(torch.zeros_like(timestep)) + context.fps
            modulation = torch.where(x_mask[..., None], modulation, self.t_block(clean)[:, None])
        modulation = modulation.unflatten(-1, (6, -1))

        def advance(name: str, index: int, tokens: list[Tensor], skip_to: list[Tensor] | None = None) -> None:
            block = getattr(self, name)[index]
            if context.kv:
                rows = context.kv[name][index]
            else:
                rows = block.cross_attn.keys_values(context.tokens.distinct, context.places)
            around: tuple[Any, ...] = ()
            shared_by = None
            for part in slices(tokens, temporal=block.temporal, limit=limit):
                if (part.groups, part.frames) != shared_by:
                    shared_by = part.groups, part.frames
                    around = context.keys_values(rows, *shared_by), context.surroundings(*shared_by)
                by_time = modulation[:, part.frames] if modulation.shape[1] > 1 else modulation
                arguments = part.of(tokens), by_time, *around
                if self.checkpoint_blocks and index % self.checkpoint_blocks == 0 and torch.is_grad_enabled():
                    result = checkpoint(block, *arguments, use_reentrant=False)
                else:
                    result = block(*arguments)
                if skip_to is not None:
                    result, skips = result
                    part.add(skip_to, skips)
                part.put(tokens, result)

        if cache is not None and cache.serves(timestep):
            main = cache.add_to(main)
        else:
            control = [self.x_control_embedder(x) + context.control for x in groups]
            for index in range(self.config.depth):
                for kind in ("s", "t") if self.config.temporal else ("s",):
                    advance(f"base_blocks_{kind}", index, main)
                    if index < len(getattr(self, f"control_blocks_{kind}")):
                        advance(f"control_blocks_{kind}", index, control, skip_to=main)
            if cache is not None:
                cache.keep(timestep, embedded(), main)  # blocks work in place: what they began with is made again
        velocities = [self._head(x, noisy, clean, x_mask, limit) for x in main]
        return self._unpatch(context.places.whole(torch.cat(velocities)), context)

    @torch.no_grad()
    def set_text_buffers(self, class_features: Tensor, base_feature: Tensor) -> None:
        """Class table and base token from text features (K, D) of the class names and (D) of the empty string.

        Both are buffers: made once, with the text projection of that moment (golden notes, oddity 11).
        """
        self.bbox_embedder._class_tokens.copy_(self.y_embedder(class_features[None])[0])
        self.base_token.copy_(self.y_embedder(base_feature[None, None])[0, 0])

    def block_groups(self) -> dict[str, nn.ModuleList]:
        """The blocks, by the names of their lists."""
        return {name: child for name, child in self.named_children() if isinstance(child, nn.ModuleList) and len(child)}

    def compile_blocks(self, backend: str) -> None:
        """Has torch compile the blocks, with one graph for all of a kind; names and weights stay as they are."""
        for blocks in self.block_groups().values():
            for block in blocks:
                block.compile(backend=backend)

    def _views_at_once(self, views: int, tokens: int) -> int:
        """Of ``views`` with so many ``tokens`` each."""
        limit = TOKENS_AT_ONCE["cpu" if self.base_token.device.type == "cpu" else "gpu"]
        return min(views, max(1, limit // tokens))

    def _keys_values(self, rows: Tensor, places: Places) -> dict[str, list[Tensor]]:
        """Of every block for the context's rows (B, R, C); none where they would take too much memory."""
        groups = self.block_groups()
        taken = sum(len(blocks) for blocks in groups.values()) * 2 * rows.nbytes // self.devices.size
        if taken > KEPT_BYTES and not torch.is_grad_enabled():
            return {}
        return {
            name: [block.cross_attn.keys_values(rows, places) for block in blocks]  # type: ignore[union-attr,operator]
            for name, blocks in groups.items()
        }

    def _head(self, x: Tensor, noisy: Tensor, clean: Tensor | None, x_mask: Tensor | None, limit: int | None) -> Tensor:
        """Velocities of a group's patches, some frames at a time: (G, B, T, S, C) -> (G, B, T, S, p*p*C)."""
        frames = x.shape[2]
        size = frames if limit is None else limit // (x[:, :, 0, :, 0].numel())
        parts = [
            self.final_layer(x[:, :, some], noisy, clean, None if x_mask is None else x_mask[:, some])
            for some in cut(frames, size)
        ]
        return torch.cat(parts, dim=2)

    def _grid(self, height: int, width: int, pad_patches: int | None) -> tuple[int, int]:
        """Rows and columns of patches. The published network has rows more for a parallel size (oddity 8)."""
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        if self.config.published:
            size = pad_patches or self.config.pad_patches or self.devices.size
            rows += size - rows % size if rows * columns % size else 0
        return rows, columns

    def _context_tokens(self, conditions: Conditions) -> ContextTokens:
        keep = conditions.keep
        keep_frame = conditions.keep_frame & keep[:, None]
        text, text_visible = self._text(conditions)
        states = conditions.box_masks.transpose(0, 1)
        states = torch.where(keep_frame[:, :, None] | (states != 1), states, -1)
        boxes = self.bbox_embedder(
            conditions.box_corners.transpose(0, 1),
            conditions.box_classes.transpose(0, 1),
            states,
            conditions.box_latent,
        )
        cameras = self.camera_embedder(conditions.cameras[:, :, 0].transpose(0, 1), keep.expand(len(boxes), -1))
        ego_motion = self.frame_embedder(conditions.ego_motion, keep_frame)
        visible = None
        if text_visible is not None:
            present = self.bbox_embedder.present(states)
            always = present.new_ones(*present.shape[:3], 2)
            visible = torch.cat([always, text_visible[:, None].expand(*present.shape[:3], -1), present], dim=-1)
        base = self.base_token
        return ContextTokens.join(ego_motion + base, cameras + base, text, boxes + base, visible)

    def _text(self, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, Lt, C), and which of them are a text's own (B, Lt).

        A dropped text is the stored null text, all of it. The published network has no attention mask: it cuts the
        batch to the longest prompt and one token more, and attends to the padding that remains (oddity 4).
        """
        text, mask, keep = conditions.text, conditions.text_mask, conditions.keep[:, None]
        null = self.y_embedder.y_embedding.to(text.dtype)
        if self.config.published:
            tokens = self.y_embedder(torch.where(keep[..., None], text, null[: text.shape[1]]))
            return tokens[:, : int(mask.sum(dim=1).max()) + 1], None
        missing = len(null) - text.shape[1]
        text, mask = functional.pad(text, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
        return self.y_embedder(torch.where(keep[..., None], text, null)), mask | ~keep

    def _position(self, conditions: Conditions, grid: tuple[int, int]) -> Tensor:
        """(B or 1, rows * columns, C). The published network knows one scale a batch (oddity 8)."""
        scale = (conditions.height.float() * conditions.width.float()).sqrt() / BASE_PIXELS
        if self.config.published:
            scale = scale[:1]
        return position_embedding(grid, scale, round((grid[0] * grid[1]) ** 0.5), self.config.width).to(self.dtype)

    def _map_tokens(
        self, conditions: Conditions, latent_shape: tuple[int, int, int], rows: int, places: Places
    ) -> Tensor:
        """(B, T, S, C) of this device's places. A dropped map is an empty one; published, it is kept (oddity 22)."""
        bev_map = conditions.bev_map
        if not self.config.published:
            # In one copy: a long clip's maps take a gigabyte.
            bev_map = bev_map.to(self.dtype, copy=True).mul_(conditions.keep[:, None, None, None, None])
        features = self.controlnet_cond_embedder(bev_map.flatten(0, 1)).unflatten(0, bev_map.shape[:2])
        features = self.controlnet_cond_embedder_temp(features).transpose(1, 2)
        if features.shape[2:] != latent_shape:
            # Means of what lies in a place of the latents; the published network takes one of them (decision 0009).
            mode = "nearest" if self.config.published else "area"
            features = functional.interpolate(features, size=latent_shape, mode=mode)
        return self.controlnet_cond_patchifier(places.own(to_patches(features, rows)))

    def _unpatch(self, patches: Tensor, context: Context) -> Tensor:
        """(V, B, T, S, p*p*C) -> (B, V, C, T, H, W) in fp32."""
        _, height, width = context.latent_shape
        x = patches.unflatten(-1, (PATCH, PATCH, -1)).unflatten(3, context.grid)
        x = x.permute(1, 0, 7, 2, 3, 5, 4, 6).flatten(6).flatten(4, 5)
        return x[..., :height, :width].float()


def to_patches(x: Tensor, rows: int) -> Tensor:
    """(..., C, T, H, W) -> (..., T, rows * columns, C * p * p), zeros appended where the size is too small."""
    height, width = x.shape[-2:]
    x = functional.pad(x, (0, width % PATCH, 0, rows * PATCH - height))
    x = x.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))
    return x.movedim((-6, -3, -1), (-3, -2, -1)).flatten(-3).flatten(-3, -2)
