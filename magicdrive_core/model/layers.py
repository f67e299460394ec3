"""The layers that every block is made of. Formulas: golden notes (README of the reference data), section 2.

n is the length of the attended sequence, h heads of d channels each, C = h * d. S are this device's places of a frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.kernels.functions import modulated_linear, modulated_mlp
from magicdrive_core.model.attention import attend_context, attend_neighbours, attend_packed, neighbour_pairs
from magicdrive_core.parallel.sequence_parallel import Places

ROTARY_BASE = 10000.0


class HeadNorm(nn.Module):
    """The weight of an RMS norm over the channels of a head; ``attention`` applies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Rotary(nn.Module):
    """Angles of the rotary position embedding: place p turns the channel pair (2k, 2k+1) by p * freqs[k].

    ``freqs`` is a parameter by name only (the published state dict lists it). It is never trained. The published
    weights keep rounded values there, which their network needs; otherwise the angles come from the formula in fp32,
    whatever the network's dtype (golden notes, oddities 5 and 6).
    """

    def __init__(self, width: int, published: bool) -> None:
        super().__init__()
        self.width = width
        self.published = published
        self.freqs = nn.Parameter(self.formula(torch.device("cpu")), requires_grad=False)

    def formula(self, device: torch.device) -> Tensor:
        """10000^(-2k/d) for k < d/2, fp32."""
        k = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        return ROTARY_BASE ** (-k / self.width)

    def forward(self, length: int) -> Tensor:
        """(length, d/2, 2): cosine and sine of every angle, fp32."""
        freqs = self.freqs.detach().float() if self.published else self.formula(self.freqs.device)
        places = torch.arange(length, device=freqs.device, dtype=torch.float32)
        angles = places[:, None] * freqs
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


class PackedAttention(nn.Module):
    """Packed q, k, v of modulated tokens with an RMS norm on q and k, and the output projection."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = HeadNorm(width // heads)
        self.k_norm = HeadNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """q, k and v of LN(x) * (1 + scale) + shift, before their norm: (..., C) -> (..., 3, h, d)."""
        packed = modulated_linear(x, shift, scale, self.qkv.weight, self.qkv.bias)
        return packed.unflatten(-1, (3, -1, len(self.q_norm.weight)))

    @property
    def norm(self) -> Tensor:
        """(2, d), the norms' weights."""
        return torch.stack([self.q_norm.weight, self.k_norm.weight])


class SpatialAttention(PackedAttention):
    """Attention among the places of every frame."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, places: Places) -> Tensor:
        """(..., S, C) -> (..., S, C)."""
        packed = places.by_heads(self.project(x, shift, scale).flatten(0, -5))
        seen = attend_packed(packed[None], self.norm, places.count)[0]
        return self.proj(places.by_places(seen).flatten(-2)).view(x.shape)


class TemporalAttention(PackedAttention):
    """Attention among the T frames of every place, with rotary embedding."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
        """(..., T, S, C) -> (..., T, S, C), ``angles`` (T, d/2, 2)."""
        by_place = self.project(x, shift, scale).flatten(0, -6).transpose(1, 2)
        seen = attend_packed(by_place, self.norm, x.shape[-3], angles)
        return self.proj(seen.transpose(1, 2).flatten(-2)).unflatten(0, x.shape[:-3])


class CrossAttention(nn.Module):
    """Attention of tokens to the context of their frame. Keys and values do not depend on the time step."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, rows: Tensor, places: Places) -> Tensor:
        """Keys and values of context tokens, for this device's c channels of heads: (B, R, C) -> (B, R, 2c)."""
        own = places.heads(self.heads)
        parts = (part.unflatten(0, (2, self.heads, -1))[:, own] for part in self.kv_linear.parameters())
        return functional.linear(rows, *(part.flatten(0, 2) for part in parts))

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor | None, places: Places) -> Tensor:
        """Attention of ``x`` (..., S, C) to ``kv`` (..., L, 2c) under ``bias`` (R, L), R all of '...'."""
        q = places.by_heads(self.q_linear(x.flatten(0, -3)).unflatten(-1, (self.heads, -1)))
        seen = attend_context(q, kv.flatten(0, -3).unflatten(-1, (2, *q.shape[2:])), bias)
        return self.proj(places.by_places(seen).flatten(-2)).view(x.shape)


class CrossViewAttention(PackedAttention):
    """Attention of every view to its neighbours in the same frame, summed over the neighbours."""

    def __init__(self, width: int, heads: int, neighbours: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(width, heads, qkv_bias=False)
        self.neighbours = neighbours

    def packed(self, groups: list[Tensor], shift: Tensor, scale: Tensor, places: Places) -> list[Tensor]:
        """q, k and v of every view, made once a view, by heads: (B * T, all places, 3, own heads, d) each.

        ``groups`` hold the views in order, (G, B, T, S, C) each.
        """
        rows = groups[0].shape[1] * groups[0].shape[2]
        by_heads = [places.by_heads(self.project(x, shift, scale).flatten(0, -5)) for x in groups]
        return [view for group in by_heads for view in group.split(rows)]

    def pairs(self, groups: list[Tensor], shift: Tensor, scale: Tensor, places: Places) -> list[list[Tensor]]:
        """For every view, attention to each of its neighbours, before the sum over these and the output projection."""
        return neighbour_pairs(self.packed(groups, shift, scale, places), self.norm, places.count, self.neighbours)

    def forward(self, groups: list[Tensor], shift: Tensor, scale: Tensor, places: Places) -> list[Tensor]:
        """Groups of views (G, B, T, S, C), in and out. The projection's bias counts for each neighbour (oddity 7)."""
        views = self.packed(groups, shift, scale, places)
        seen = iter(attend_neighbours(views, self.norm, places.count, self.neighbours))
        proj_bias = self.proj.bias * len(self.neighbours[0])
        out = []
        for x in groups:
            own = places.by_places(torch.cat([next(seen) for _ in x])).flatten(-2).view(x.shape)
            out.append(functional.linear(own, self.proj.weight, proj_bias))
        return out


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class ModulatedMlp(Mlp):
    """The MLP of a block, on modulated tokens."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """(..., C) -> (..., C); ``shift`` and ``scale`` broadcast against x."""
        return modulated_mlp(x, shift, scale, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class PatchEmbedding(nn.Module):
    """Convolution with kernel = stride = (1, p, p), written as a linear map of patches."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=(1, patch, patch), stride=(1, patch, patch))

    def forward(self, patches: Tensor) -> Tensor:
        """(..., C_in * p * p) in the order channel, row, column -> (..., C)."""
        return functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """[cos(v g), sin(v g)] with g_k = 10000^(-k / (width/2)), fp32: (B) -> (B, width)."""
    half = width // 2
    k = torch.arange(half, device=values.device, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) / half * k)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedding(nn.Module):
    """A number (time step, frames a second) as a vector: sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """(B) -> (B, C)."""
        return self.mlp(sinusoid(values).to(next(self.parameters()).dtype))


def position_embedding(grid: tuple[int, int], scale: Tensor, base: int, width: int) -> Tensor:
    """[sin(x f), cos(x f), sin(y f), cos(y f)] of every patch in fp32; the column x comes first.

    Args:
        grid: rows and columns of patches.
        scale: (B), sqrt(height * width in pixels) / 512.
        base: round(sqrt(rows * columns)).
        width: C, a multiple of 4.

    Returns:
        (B, rows * columns, C).
    """
    rows, columns = grid
    device = scale.device
    k = torch.arange(width // 4, device=device, dtype=torch.float32)
    freqs = 1.0 / 10000.0 ** (2 * k / (width // 2))

    def axis(count: int) -> Tensor:
        places = torch.arange(count, device=device, dtype=torch.float32) / scale[:, None] * (base / count)
        angles = places[..., None] * freqs
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    x = axis(columns)[:, None].expand(-1, rows, -1, -1)
    y = axis(rows)[:, :, None].expand(-1, -1, columns, -1)
    return torch.cat([x, y], dim=-1).flatten(1, 2)
