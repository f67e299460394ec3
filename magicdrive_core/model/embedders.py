"""What the network is told, as tokens and feature maps. Golden notes (README of the reference data), section 2.

Letters: V views, B samples, F frames, T' context frames, N box slots, L text tokens, C width, D text width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.model.layers import Mlp, ModulatedMlp, Rotary, TemporalAttention

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
FOURIER_WIDTH = 3 * (1 + 2 * len(FREQUENCIES))  # 27 numbers for a 3-vector
CORNERS = 8
PICTURE_WIDTH = 1600.0  # pixels: intrinsics are divided by it where the published scale is not asked for


def fourier(vectors: Tensor) -> Tensor:
    """[x, sin x, cos x, sin 2x, cos 2x, sin 4x, cos 4x, sin 8x, cos 8x] in fp32: (..., 3) -> (..., 27)."""
    vectors = vectors.float()
    parts = [vectors]
    for frequency in FREQUENCIES:
        parts += [(vectors * frequency).sin(), (vectors * frequency).cos()]
    return torch.cat(parts, dim=-1)


def halve_frames(x: Tensor, dim: int) -> Tensor:
    """Means of neighbouring pairs along ``dim``; of an odd count the first is kept as it is."""
    odd = x.shape[dim] % 2
    first, rest = x.split([odd, x.shape[dim] - odd], dim)
    return torch.cat([first, rest.unflatten(dim, (x.shape[dim] // 2, 2)).mean(dim + 1)], dim)


def halved_any(flags: Tensor, dim: int) -> Tensor:
    """``halve_frames`` for booleans: whether any frame of a group is True."""
    odd = flags.shape[dim] % 2
    first, rest = flags.split([odd, flags.shape[dim] - odd], dim)
    return torch.cat([first, rest.unflatten(dim, (flags.shape[dim] // 2, 2)).any(dim + 1)], dim)


class TextEmbedder(nn.Module):
    """Projected text features. ``y_embedding`` stands for a dropped text: drawn once, never trained."""

    y_embedding: Tensor

    def __init__(self, text_width: int, width: int, tokens: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(tokens, text_width) / text_width**0.5)
        self.y_proj = Mlp(text_width, width, width)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, C)."""
        return self.y_proj(text.to(self.y_proj.fc1.weight.dtype))


class CameraEmbedder(nn.Module):
    """One token a view from the clip's first frame: seven columns of [K | R | t] through Fourier features."""

    def __init__(self, width: int, published: bool) -> None:
        super().__init__()
        self.published = published
        self.uncond_cam = nn.Parameter(torch.randn(3, 7))
        self.emb2token = nn.Linear(7 * FOURIER_WIDTH, width)
        self.after_proj = nn.Linear(width, width)

    def forward(self, cameras: Tensor, keep: Tensor) -> Tensor:
        """(..., 3, 7) with pixels of the 1600x900 picture, keep (...) bool -> (..., C).

        The published network takes the intrinsics in pixels, about 1e3, into sines and linear maps (oddity 3).
        Otherwise they enter in units of the picture's width.
        """
        cameras = cameras.float()
        if not self.published:
            unit = cameras.new_ones(3, 7)
            unit[:2, :3] = 1 / PICTURE_WIDTH
            cameras = cameras * unit
        cameras = torch.where(keep[..., None, None], cameras, self.uncond_cam.float())
        features = fourier(cameras.transpose(-1, -2)).flatten(-2)
        return self.after_proj(self.emb2token(features.to(self.emb2token.weight.dtype)))


class TemporalEmbedder(nn.Module):
    """A transformer block over the frames of a condition, with a static modulation, then a reduction of the frames."""

    def __init__(self, width: int, heads: int, mean_over_frames: bool, published: bool) -> None:
        super().__init__()
        self.mean_over_frames = mean_over_frames
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.rope = Rotary(width // heads, published)
        self.attn = TemporalAttention(width, heads)
        self.mlp = ModulatedMlp(width, 4 * width)
        self.final_proj = nn.Linear(width, width)

    def over_time(self, x: Tensor) -> Tensor:
        """(R, F, N, C) -> (R, T', N, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table.unbind(0)
        x = x + gate1 * self.attn(x, shift1, scale1, self.rope(x.shape[1]))
        x = x + gate2 * self.mlp(x, shift2, scale2)
        x = self.final_proj(x)
        return x.mean(1, keepdim=True) if self.mean_over_frames else halve_frames(halve_frames(x, 1), 1)


class EgoMotionEmbedder(TemporalEmbedder):
    """Tokens of the motion from the first lidar frame to each frame's own."""

    def __init__(self, width: int, heads: int, mean_over_frames: bool, published: bool) -> None:
        super().__init__(width, heads, mean_over_frames, published)
        self.uncond_cam = nn.Parameter(torch.randn(3, 4))
        self.emb2token = nn.Linear(4 * FOURIER_WIDTH, width)

    def forward(self, ego_motion: Tensor, keep: Tensor) -> Tensor:
        """(B, F, 4, 4), keep (B, F) bool -> (B, T', C)."""
        poses = torch.where(keep[..., None, None], ego_motion[..., :3, :].float(), self.uncond_cam.float())
        features = fourier(poses.transpose(-1, -2)).flatten(-2)
        tokens = self.emb2token(features.to(self.emb2token.weight.dtype))
        return self.over_time(tokens[..., None, :])[..., 0, :]


class BoxEmbedder(TemporalEmbedder):
    """Tokens of 3D boxes: eight corners through Fourier features, joined with a vector of the class."""

    _class_tokens: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        mean_over_frames: bool,
        published: bool,
        *,
        classes: int,
        class_width: int,
        widths: tuple[int, ...],
        instance_latent: bool,
    ) -> None:
        super().__init__(width, heads, mean_over_frames, published)
        features = CORNERS * FOURIER_WIDTH
        if instance_latent:
            self.mean_var = nn.Parameter(torch.randn(classes, 2))
        self.instance_latent = instance_latent
        self.null_class_feature = nn.Parameter(torch.zeros(class_width))
        self.null_pos_feature = nn.Parameter(torch.zeros(features))
        self.mask_class_feature = nn.Parameter(torch.zeros(class_width))
        self.mask_pos_feature = nn.Parameter(torch.zeros(features))
        self.register_buffer("_class_tokens", torch.randn(classes, class_width))
        first, *hidden = widths
        self.bbox_proj = nn.Linear(features, first)
        layers: list[nn.Module] = []
        for before, after in zip([first + class_width, *hidden], [*hidden, width], strict=True):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.second_linear = nn.Sequential(*layers[:-1])

    def forward(self, corners: Tensor, classes: Tensor, states: Tensor, latent: Tensor | None) -> Tensor:
        """Box tokens.

        Args:
            corners: (V, B, F, N, 8, 3) metres.
            classes: (V, B, F, N), -1 where there is no box.
            states: (V, B, F, N), 1 shown, 0 no box, -1 hidden.
            latent: (B, N, class width), a standard normal vector an object; None: zeros.

        Returns:
            (V, B, T', N, C).
        """
        dtype = self.bbox_proj.weight.dtype
        known = classes.clamp(min=0)
        kind = self._class_tokens[known]
        if self.instance_latent:
            mean, log_variance = self.mean_var[known].unbind(-1)
            kind = kind + mean[..., None]
            if latent is not None:
                kind = kind + latent[:, None].to(dtype) * (0.5 * log_variance).exp()[..., None]
        shown, absent = (states == 1)[..., None], (states == 0)[..., None]
        position = torch.where(shown, fourier(corners).flatten(-2).to(dtype), self.mask_pos_feature)
        position = torch.where(absent, self.null_pos_feature, position)
        kind = torch.where(absent, self.null_class_feature, torch.where(shown, kind, self.mask_class_feature))
        tokens = torch.cat([functional.silu(self.bbox_proj(position)), kind], dim=-1)
        return self.over_time(self.second_linear(tokens).flatten(0, 1)).unflatten(0, states.shape[:2])

    def present(self, states: Tensor) -> Tensor:
        """Which box tokens stand for a box, shown or hidden, in any of their frames: (V, B, F, N) -> (V, B, T', N)."""
        here = states != 0
        if self.mean_over_frames:
            return here.any(2, keepdim=True)
        return halved_any(halved_any(here, 2), 2)


class MapEncoder(nn.Module):
    """Convolutions from BEV cells to the latents' grid: 200x200 -> 28x50, 400x400 -> 53x100."""

    def __init__(self, layers: int, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(layers, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(channels[:-1]):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, stride=2, padding=(2, 1)))
        self.blocks.append(nn.Conv2d(channels[-2], channels[-2], 3, padding=(2, 1)))
        self.blocks.append(nn.Conv2d(channels[-2], channels[-1], 3, stride=(2, 1), padding=(2, 1)))
        self.conv_out = nn.Conv2d(channels[-1], width // 2, 3, padding=1)

    def forward(self, bev_map: Tensor) -> Tensor:
        """(R, 8, rows, columns) -> (R, C/2, h, w)."""
        x = bev_map.to(self.conv_in.weight.dtype)
        if (
            x.device.type == "cpu"
        ):  # an eighth less of a training step's time for the map (benchmarks/results/network.md)
            x = x.contiguous(memory_format=torch.channels_last)
        x = functional.silu(self.conv_in(x))
        for block in self.blocks:
            x = functional.silu(block(x))
        return self.conv_out(x)


class FrameHalving(nn.Module):
    """Halves the frames of (B, F, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return halve_frames(x, 1)


class FrameConvolution(nn.Module):
    """A 3x3 convolution of every frame of (B, F, C, h, w)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class MapReduction(nn.Module):
    """From frames to latent frames: halved and convolved twice. (B, F, C/2, h, w) -> (B, T', C, h, w).

    The notes tell of zero padding in two halves, around the halving; halving keeps zeros, so it is plain padding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv_blocks = nn.Sequential(
            FrameHalving(), FrameConvolution(half, half), FrameHalving(), FrameConvolution(half, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_blocks(x)
