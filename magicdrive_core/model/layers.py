"""The layers that every block is made of. Formulas: golden notes (README of the reference data), section 2.

n is the length of the attended sequence, h heads of d channels each, C = h * d. S are this device's places of a frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from magicdrive_core.model.kernels import modulated_mlp, modulated_qkv
from magicdrive_core.model.parallel import Places

ROTARY_BASE = 10000.0


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v, for each head.

    Args:
        q: (R, n, h, d).
        k: (R, m, h, d).
        v: (R, m, h, d).
        bias: broadcastable to (R, h, n, m), 0 or -inf: what must not be attended to.

    Returns:
        (R, n, h, d).
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


class HeadNorm(nn.Module):
    """The weight of an RMS norm over the channels of a head; ``kernels.modulated_qkv`` applies it."""

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


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the channel pairs of ``x`` (..., T, S, h, d) by the frames' ``angles`` (T, d/2, 2), computed in fp32."""
    turns = torch.view_as_complex(angles)[:, None, None]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class PackedAttention(nn.Module):
    """Packed q, k, v of modulated tokens with an RMS norm on q and k, and the output projection."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = HeadNorm(width // heads)
        self.k_norm = HeadNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (normalised) and v of LN(x) * (1 + scale) + shift: (..., C) -> (..., h, d) each."""
        norm = torch.stack([self.q_norm.weight, self.k_norm.weight])
        return modulated_qkv(x, shift, scale, self.qkv.weight, self.qkv.bias, norm)


class SpatialAttention(PackedAttention):
    """Attention among the places of every frame."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, places: Places) -> Tensor:
        """(..., S, C) -> (..., S, C)."""
        q, k, v = places.by_heads(*(tensor.flatten(0, -4) for tensor in self.project(x, shift, scale)))
        seen = attend(q, k[:, : places.count], v[:, : places.count])
        return self.proj(places.by_places(seen).flatten(-2)).view(x.shape)


class TemporalAttention(PackedAttention):
    """Attention among the T frames of every place, with rotary embedding."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
        """(..., T, S, C) -> (..., T, S, C), ``angles`` (T, d/2, 2)."""
        q, k, v = self.project(x, shift, scale)
        by_place = (tensor.transpose(-4, -3).flatten(0, -4) for tensor in (rotate(q, angles), rotate(k, angles), v))
        out = attend(*by_place).flatten(-2)
        return self.proj(out.view(x.transpose(-3, -2).shape).transpose(-3, -2))


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
        """Attention of ``x`` (..., S, C) to ``kv`` (..., L, 2c) under ``bias`` (R, 1, 1, L), R all of '...'."""
        (q,) = places.by_heads(self.q_linear(x.flatten(0, -3)).unflatten(-1, (self.heads, -1)))
        k, v = kv.flatten(0, -3).unflatten(-1, (2, *q.shape[2:])).unbind(-3)
        return self.proj(places.by_places(attend(q, k, v, bias)).flatten(-2)).view(x.shape)


class CrossViewAttention(PackedAttention):
    """Attention of every view to its neighbours in the same frame, summed over the neighbours."""

    def __init__(self, width: int, heads: int, neighbours: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(width, heads, qkv_bias=False)
        self.neighbours = neighbours

    def pairs(self, groups: list[Tensor], shift: Tensor, scale: Tensor, places: Places) -> list[list[Tensor]]:
        """For every view, attention to each of its neighbours before the output projection.

        q, k and v are made once a view. ``groups`` hold the views in order, (G, B, T, S, C) each; the result is by
        heads: (B * T, all places, own heads, d) each.
        """
        projected = [
            places.by_heads(*(tensor.flatten(0, -4) for tensor in self.project(x, shift, scale))) for x in groups
        ]
        rows = groups[0].shape[1] * groups[0].shape[2]
        q, k, v = ([view for tensors in projected for view in tensors[i].split(rows)] for i in range(3))
        k, v = ([view[:, : places.count] for view in views] for views in (k, v))
        return [
            [attend(q[view], k[other], v[other]) for other in others] for view, others in enumerate(self.neighbours)
        ]

    def forward(self, groups: list[Tensor], shift: Tensor, scale: Tensor, places: Places) -> list[Tensor]:
        """Groups of views (G, B, T, S, C), in and out. The projection's bias counts for each neighbour (oddity 7)."""
        seen = iter([sum(outputs[1:], outputs[0]) for outputs in self.pairs(groups, shift, scale, places)])
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
