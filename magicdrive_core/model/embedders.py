"""Embedders: latents, numbers and conditions as tokens and feature maps. Golden notes, section 2.

Shapes: B samples, V views, F frames, T' context frames, N box slots, L text tokens, K classes, C width, D text width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.model.attention import Rotary, TemporalAttention
from magicdrive_core.model.blocks import Mlp, ModulatedMlp
from magicdrive_core.model.config import NetworkConfig

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
FOURIER_WIDTH = 3 * (1 + 2 * len(FREQUENCIES))  # 27 numbers for a 3-vector
CORNERS = 8
PICTURE_WIDTH = 1600.0  # pixels of the width of a nuScenes picture, the unit of the intrinsics


class PatchEmbedding(nn.Module):
    """Convolution with kernel = stride = (1, p, p), written as a linear map of patches.

    Args:
        channels: channels of the input.
        width: C.
        patch: p.
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=(1, patch, patch), stride=(1, patch, patch))

    def forward(self, patches: Tensor) -> Tensor:
        """Embeds patches as tokens.

        Args:
            patches: (..., channels * p * p) in the order channel, row, column.

        Returns:
            (..., C).
        """
        return functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """Computes [cos(v g), sin(v g)] with g_k = 10000^(-k / (width/2)) (golden notes, section 2).

    Args:
        values: (B) numbers v.
        width: channels of the result, an even number.

    Returns:
        (B, width), fp32.
    """
    half = width // 2
    k = torch.arange(half, device=values.device, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) / half * k)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedding(nn.Module):
    """A number (noise level, frames a second) as a vector: sinusoid, Linear, SiLU, Linear.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """Embeds numbers.

        Args:
            values: (B), noise levels in [0, 1000] or frames a second.

        Returns:
            (B, C) in the dtype of the weights.
        """
        return self.mlp(sinusoid(values).to(next(self.parameters()).dtype))


def position_embedding(grid: tuple[int, int], scale: Tensor, base: int, width: int) -> Tensor:
    """Computes [sin(x f), cos(x f), sin(y f), cos(y f)] of every patch; the column x comes first.

    Positions are scaled to a square of 512 pixels (golden notes, section 2).

    Args:
        grid: rows and columns of patches.
        scale: (B), sqrt(height * width in pixels) / 512.
        base: round(sqrt(rows * columns)).
        width: C, a multiple of 4.

    Returns:
        (B, rows * columns, C), fp32, row by row.
    """
    rows, columns = grid
    device = scale.device
    k = torch.arange(width // 4, device=device, dtype=torch.float32)
    freqs = 1.0 / 10000.0 ** (2 * k / (width // 2))

    def axis(count: int) -> Tensor:
        positions = torch.arange(count, device=device, dtype=torch.float32) / scale[:, None] * (base / count)
        angles = positions[..., None] * freqs
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    x = axis(columns)[:, None].expand(-1, rows, -1, -1)
    y = axis(rows)[:, :, None].expand(-1, -1, columns, -1)
    return torch.cat([x, y], dim=-1).flatten(1, 2)


def fourier(vectors: Tensor) -> Tensor:
    """Computes [x, sin x, cos x, sin 2x, cos 2x, sin 4x, cos 4x, sin 8x, cos 8x] (golden notes, section 2).

    Args:
        vectors: (..., 3).

    Returns:
        (..., 27), fp32.
    """
    vectors = vectors.float()
    parts = [vectors]
    for frequency in FREQUENCIES:
        parts += [(vectors * frequency).sin(), (vectors * frequency).cos()]
    return torch.cat(parts, dim=-1)


def halve_frames(x: Tensor, dim: int) -> Tensor:
    """Takes means of neighbouring pairs of frames; of an odd count the first is kept as it is.

    Args:
        x: any shape with F frames along ``dim``.
        dim: dimension of the frames, counted from the front.

    Returns:
        Shaped like ``x`` with ceil(F/2) frames.
    """
    odd = x.shape[dim] % 2
    first, rest = x.split([odd, x.shape[dim] - odd], dim)
    return torch.cat([first, rest.unflatten(dim, (x.shape[dim] // 2, 2)).mean(dim + 1)], dim)


def halve_flags(flags: Tensor, dim: int) -> Tensor:
    """Halves booleans as ``halve_frames`` halves numbers: whether any frame of a pair is True.

    Args:
        flags: bool of any shape with F frames along ``dim``.
        dim: dimension of the frames, counted from the front.

    Returns:
        Bool, shaped like ``flags`` with ceil(F/2) frames.
    """
    odd = flags.shape[dim] % 2
    first, rest = flags.split([odd, flags.shape[dim] - odd], dim)
    return torch.cat([first, rest.unflatten(dim, (flags.shape[dim] // 2, 2)).any(dim + 1)], dim)


class TextEmbedder(nn.Module):
    """Projects text features. ``y_embedding`` stands for a dropped text: drawn once, never trained.

    Args:
        text_width: D, channels of the text features.
        width: C.
        tokens: L, most text tokens.

    Attributes:
        y_embedding: (L, D), the null text.
    """

    y_embedding: Tensor

    def __init__(self, text_width: int, width: int, tokens: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(tokens, text_width) / text_width**0.5)
        self.y_proj = Mlp(text_width, width, width)

    def forward(self, text: Tensor) -> Tensor:
        """Projects text features to tokens.

        Args:
            text: (B, L, D).

        Returns:
            (B, L, C) in the dtype of the weights.
        """
        return self.y_proj(text.to(self.y_proj.fc1.weight.dtype))


class CameraEmbedder(nn.Module):
    """One token a view from the clip's first frame: seven columns of [K | R | t] through Fourier features.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.uncond_cam = nn.Parameter(torch.randn(3, 7))
        self.emb2token = nn.Linear(7 * FOURIER_WIDTH, width)
        self.after_proj = nn.Linear(width, width)

    def forward(self, cameras: Tensor, keep: Tensor) -> Tensor:
        """Embeds cameras.

        Args:
            cameras: (..., 3, 7), [K | R | t]: K in pixels of the 1600x900 picture, camera-to-lidar R, t in metres.
            keep: (...) bool, False = the camera is dropped.

        Returns:
            (..., C).
        """
        cameras = torch.where(keep[..., None, None], self.in_units(cameras.float()), self.uncond_cam.float())
        features = rearrange(fourier(cameras.transpose(-1, -2)), "... column f -> ... (column f)")
        return self.after_proj(self.emb2token(features.to(self.emb2token.weight.dtype)))

    def in_units(self, cameras: Tensor) -> Tensor:
        """Divides the intrinsics by the width of the picture: pixels, about 1e3, would go through sines.

        Args:
            cameras: (..., 3, 7), intrinsics in pixels of the 1600x900 picture.

        Returns:
            (..., 3, 7), with the first two rows of the intrinsics in picture widths.
        """
        unit = cameras.new_ones(3, 7)
        unit[:2, :3] = 1 / PICTURE_WIDTH
        return cameras * unit


class TemporalEmbedder(nn.Module):
    """A transformer block over the frames of a condition, with a static modulation, then a reduction of the frames.

    Args:
        width: C.
        heads: attention heads over the frames.
        mean_over_frames: whether one token, the mean, remains; else a quarter of the frames.
    """

    def __init__(self, width: int, heads: int, mean_over_frames: bool) -> None:
        super().__init__()
        self.mean_over_frames = mean_over_frames
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.rope = Rotary(width // heads)
        self.attn = TemporalAttention(width, heads)
        self.mlp = ModulatedMlp(width, 4 * width)
        self.final_proj = nn.Linear(width, width)

    def over_time(self, x: Tensor) -> Tensor:
        """Lets the frames of a condition attend to one another, then reduces them.

        Args:
            x: (R, F, N, C): R sequences of F frames at each of N positions.

        Returns:
            (R, T', N, C), T' = 1 with ``mean_over_frames``, else ceil(F/4).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table.unbind(0)
        x = x + gate1 * self.attn(x, shift1, scale1, self.rope(x.shape[1]))
        x = x + gate2 * self.mlp(x, shift2, scale2)
        x = self.final_proj(x)
        return x.mean(1, keepdim=True) if self.mean_over_frames else halve_frames(halve_frames(x, 1), 1)


class EgoMotionEmbedder(TemporalEmbedder):
    """Tokens of the motion from the first lidar frame to each frame's own.

    Args:
        width: C.
        heads: attention heads over the frames.
        mean_over_frames: whether one token, the mean, remains; else a quarter of the frames.
    """

    def __init__(self, width: int, heads: int, mean_over_frames: bool) -> None:
        super().__init__(width, heads, mean_over_frames)
        self.uncond_cam = nn.Parameter(torch.randn(3, 4))
        self.emb2token = nn.Linear(4 * FOURIER_WIDTH, width)

    def forward(self, ego_motion: Tensor, keep: Tensor) -> Tensor:
        """Embeds ego motion.

        Args:
            ego_motion: (B, F, 4, 4), transforms from the first lidar frame to each lidar frame, metres.
            keep: (B, F) bool, False = the frame's ego motion is dropped.

        Returns:
            (B, T', C).
        """
        poses = torch.where(keep[..., None, None], ego_motion[..., :3, :].float(), self.uncond_cam.float())
        features = rearrange(fourier(poses.transpose(-1, -2)), "... column f -> ... (column f)")
        tokens = self.emb2token(features.to(self.emb2token.weight.dtype))
        return self.over_time(tokens[..., None, :])[..., 0, :]


class BoxEmbedder(TemporalEmbedder):
    """Tokens of 3D boxes: eight corners through Fourier features, joined with a vector of the class.

    Args:
        config: sizes of the network.
    """

    _class_tokens: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config.width, config.box_heads, config.mean_over_frames)
        features = CORNERS * FOURIER_WIDTH
        class_width = config.class_width or config.width
        self.instance_latent = config.instance_latent
        if config.instance_latent:
            self.mean_var = nn.Parameter(torch.randn(config.classes, 2))
        self.null_class_feature = nn.Parameter(torch.zeros(class_width))
        self.null_pos_feature = nn.Parameter(torch.zeros(features))
        self.mask_class_feature = nn.Parameter(torch.zeros(class_width))
        self.mask_pos_feature = nn.Parameter(torch.zeros(features))
        self.register_buffer("_class_tokens", torch.randn(config.classes, class_width))
        first, *hidden = config.box_widths
        self.bbox_proj = nn.Linear(features, first)
        layers: list[nn.Module] = []
        for before, after in zip([first + class_width, *hidden], [*hidden, config.width], strict=True):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.second_linear = nn.Sequential(*layers[:-1])

    def forward(self, corners: Tensor, classes: Tensor, states: Tensor, latent: Tensor | None) -> Tensor:
        """Embeds boxes.

        Args:
            corners: (B, V, F, N, 8, 3) metres.
            classes: (B, V, F, N), -1 where there is no box.
            states: (B, V, F, N), 1 shown, 0 no box, -1 hidden.
            latent: (B, N, class width), a standard normal vector an object; None: zeros.

        Returns:
            (B, V, T', N, C).
        """
        dtype = self.bbox_proj.weight.dtype
        known = classes.clamp(min=0)
        kind = self._class_tokens[known]
        if self.instance_latent:
            mean, log_variance = self.mean_var[known].unbind(-1)
            kind = kind + mean[..., None]
            if latent is not None:
                kind = kind + latent[:, None, None].to(dtype) * (0.5 * log_variance).exp()[..., None]
        shown, absent = (states == 1)[..., None], (states == 0)[..., None]
        features = rearrange(fourier(corners), "... corner f -> ... (corner f)")
        position = torch.where(shown, features.to(dtype), self.mask_pos_feature)
        position = torch.where(absent, self.null_pos_feature, position)
        kind = torch.where(absent, self.null_class_feature, torch.where(shown, kind, self.mask_class_feature))
        tokens = self.second_linear(torch.cat([functional.silu(self.bbox_proj(position)), kind], dim=-1))
        by_view = rearrange(tokens, "b v f n c -> (b v) f n c")
        return self.over_time(by_view).unflatten(0, states.shape[:2])

    def present(self, states: Tensor) -> Tensor:
        """Tells which box tokens stand for a box, shown or hidden, in any of their frames.

        Args:
            states: (B, V, F, N), 1 shown, 0 no box, -1 hidden.

        Returns:
            (B, V, T', N) bool.
        """
        here = states != 0
        if self.mean_over_frames:
            return here.any(2, keepdim=True)
        return halve_flags(halve_flags(here, 2), 2)


class MapEncoder(nn.Module):
    """Convolutions from BEV cells to the latents' grid: 200x200 -> 28x50, 400x400 -> 53x100.

    Args:
        layers: layers of the BEV map.
        channels: channels of the convolutions, from the first to the last.
        width: C.
    """

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
        """Encodes the BEV map of every frame.

        Args:
            bev_map: (B * F, layers, rows, columns) of BEV cells, 0 or 1.

        Returns:
            (B * F, C/2, h, w) features on about the latents' grid.
        """
        x = bev_map.to(self.conv_in.weight.dtype)
        if x.device.type == "cpu":  # an eighth less time (benchmarks/results/network.md)
            x = x.contiguous(memory_format=torch.channels_last)
        x = functional.silu(self.conv_in(x))
        for block in self.blocks:
            x = functional.silu(block(x))
        return self.conv_out(x)


class FrameHalving(nn.Module):
    """Halves the frames of (B, F, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Takes means of neighbouring pairs of frames; of an odd count the first is kept as it is.

        Args:
            x: (B, F, C, h, w).

        Returns:
            (B, ceil(F/2), C, h, w).
        """
        return halve_frames(x, 1)


class FrameConvolution(nn.Module):
    """A 3x3 convolution of every frame of (B, F, C, h, w).

    Args:
        channels: channels of the input.
        out: channels of the output.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves every frame.

        Args:
            x: (B, F, channels, h, w).

        Returns:
            (B, F, out, h, w).
        """
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class MapReduction(nn.Module):
    """Reduces the map's frames to latent frames: twice halved and convolved.

    The golden notes describe zero padding in two halves, around the halving. Halving keeps zeros, so plain padding is
    the same.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv_blocks = nn.Sequential(
            FrameHalving(), FrameConvolution(half, half), FrameHalving(), FrameConvolution(half, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reduces frames to latent frames.

        Args:
            x: (B, F, C/2, h, w) map features.

        Returns:
            (B, T', C, h, w), T' = ceil(F/4).
        """
        return self.conv_blocks(x)
