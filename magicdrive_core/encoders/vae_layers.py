"""Layers that replace diffusers' ones in the CogVideoX VAE, with equal weights and state-dict names.

``PlaneCausalConv3d`` computes causal 3D convolutions as 2D ones, for CPUs. torch computes small 3D convolutions without
oneDNN (measured: 8 to 25 times slower for 8 to 16 channels at 112x200), and convolves a single frame, which is repeated
as its own past, three times. Summing the kernel's frames for a single frame, and moving them into the channels for
clips, gives 2D convolutions of the same numbers.

``LeanSpatialNorm`` normalises with three full-size activations in memory instead of six, and keeps no cache.

Shapes: N videos, C channels, F frames, H, W rows and columns; latents (N, C_z, T, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

# torch computes a 3D convolution with oneDNN above this product of batch, channels, frames and rows.
ONEDNN_VALUES = 20480


class PlaneConv3d(nn.Module):
    """A 3D convolution that is computed as a 2D one where this is faster.

    Args:
        conv: the convolution whose weights are used, under the same names.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = tuple(int(side) for side in conv.padding[1:])

    def single(self, frame: Tensor) -> Tensor:
        """Convolves a single frame that is repeated as its own past.

        Args:
            frame: (N, C, 1, H, W).

        Returns:
            (N, C_out, 1, H, W).
        """
        weight = self.weight.sum(dim=2)
        return functional.conv2d(frame[:, :, 0], weight, self.bias, padding=self.padding)[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        """Convolves frames, padded along rows and columns but not in time.

        Args:
            x: (N, C, F, H, W), the past frames included.

        Returns:
            (N, C_out, F - kernel frames + 1, H, W).
        """
        kernel = self.weight.shape[2]
        if kernel > 1 and x.shape[:4].numel() > ONEDNN_VALUES:
            return functional.conv3d(x, self.weight, self.bias, padding=(0, *self.padding))
        F = x.shape[2] - kernel + 1
        windows = torch.cat([x[:, :, shift : shift + F] for shift in range(kernel)], dim=1) if kernel > 1 else x
        planes = rearrange(windows, "n c f h w -> (n f) c h w")
        weight = rearrange(self.weight, "c_out c_in f h w -> c_out (f c_in) h w")
        out = functional.conv2d(planes, weight, self.bias, padding=self.padding)
        return rearrange(out, "(n f) c h w -> n c f h w", f=F)


class PlaneCausalConv3d(nn.Module):
    """Replaces a ``CogVideoXCausalConv3d``: equal values to rounding, state-dict names and cache.

    Args:
        causal: the layer to replace.
    """

    def __init__(self, causal: CogVideoXCausalConv3d) -> None:
        super().__init__()
        self.conv = PlaneConv3d(causal.conv)
        self.past = causal.time_kernel_size - 1

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Convolves frames together with their past.

        Args:
            inputs: (N, C, F, H, W).
            conv_cache: last frames of the chunk before (N, C, past, H, W); None: the first frame is repeated.

        Returns:
            (N, C_out, F, H, W), and the last frames (N, C, past, H, W) for the next chunk; None if ``past`` is 0.
        """
        if self.past == 0:
            return self.conv(inputs), None
        if conv_cache is None and inputs.shape[2] == 1:
            return self.conv.single(inputs), inputs.expand(-1, -1, self.past, -1, -1)
        if conv_cache is None:
            conv_cache = inputs[:, :, :1].expand(-1, -1, self.past, -1, -1)
        x = torch.cat([conv_cache, inputs], dim=2)
        return self.conv(x), x[:, :, -self.past :].clone()


def use_plane_convolutions(model: nn.Module) -> None:
    """Replaces the causal convolutions of a CogVideoX VAE in place.

    Args:
        model: the diffusers model; its weights and their names are kept.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CogVideoXCausalConv3d):
                setattr(parent, name, PlaneCausalConv3d(child))


class LeanSpatialNorm(nn.Module):
    """Replaces a ``CogVideoXSpatialNorm3D`` without gradients: equal bits, state-dict names and interface.

    Its 1x1x1 convolutions see only their own frame, so that nothing has to be kept for the next group of frames, while
    diffusers keeps a full copy of their input (golden notes, oddity 23).

    Args:
        norm: the layer to replace.
    """

    def __init__(self, norm: CogVideoXSpatialNorm3D) -> None:
        super().__init__()
        self.norm_layer, self.conv_y, self.conv_b = norm.norm_layer, norm.conv_y, norm.conv_b

    def forward(
        self, f: Tensor, zq: Tensor, conv_cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalises activations, then scales and shifts each position by the latents there.

        Args:
            f: activations (N, C, F, H, W).
            zq: latents (N, C_z, T, h, w).
            conv_cache: unused, part of diffusers' interface.

        Returns:
            (N, C, F, H, W), and an empty cache.
        """
        del conv_cache
        return self.modulate(self.norm_layer(f), resized(zq, f.shape[-3:])), {}

    def modulate(self, normed: Tensor, zq: Tensor) -> Tensor:
        """Scales and shifts normalised activations by the latents at each position, in place.

        Args:
            normed: (N, C, F, H, W), written over.
            zq: latents (N, C_z, F, H, W), resized to the activations.

        Returns:
            ``normed``.
        """
        normed.mul_(self.conv_y.conv(zq))
        normed.add_(self.conv_b.conv(zq))
        return normed


def resized(zq: Tensor, shape: Sequence[int]) -> Tensor:
    """Resizes latents to the shape of activations by nearest neighbours.

    With an odd number of frames above 1, the first one is resized from the first latent frame alone.

    Args:
        zq: (N, C_z, T, h, w).
        shape: F, H, W of the activations.

    Returns:
        (N, C_z, F, H, W).
    """
    if shape[0] > 1 and shape[0] % 2 == 1:
        first = functional.interpolate(zq[:, :, :1], size=(1, *shape[1:]))
        rest = functional.interpolate(zq[:, :, 1:], size=(shape[0] - 1, *shape[1:]))
        return torch.cat([first, rest], dim=2)
    return functional.interpolate(zq, size=tuple(shape))


def use_lean_norms(model: nn.Module) -> None:
    """Replaces the spatial norms of a frozen CogVideoX VAE in place.

    Args:
        model: the diffusers model; its weights and their names are kept.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CogVideoXSpatialNorm3D):
                setattr(parent, name, LeanSpatialNorm(child))
