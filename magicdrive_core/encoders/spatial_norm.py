"""The VAE decoder's spatial norms with three full activations alive instead of six, and no caches that nobody reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import Tensor, nn
from torch.nn import functional


class LeanSpatialNorm(nn.Module):
    """Stands in for a ``CogVideoXSpatialNorm3D`` without gradients: the same bits, state-dict names and interface.

    Its 1x1x1 convolutions look at no frame but their own, so that there is nothing to keep for the next group, where
    diffusers keeps a full copy of their input (golden notes, oddity 23).
    """

    def __init__(self, norm: CogVideoXSpatialNorm3D) -> None:
        super().__init__()
        self.norm_layer, self.conv_y, self.conv_b = norm.norm_layer, norm.conv_y, norm.conv_b

    def forward(
        self, f: Tensor, zq: Tensor, conv_cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Group norm of (N, C, F, H, W), scaled and shifted by what the latents (N, C_z, T, h, w) say of each place."""
        del conv_cache  # the interface's: nothing is kept
        return self.modulate(self.norm_layer(f), resized(zq, f.shape[-3:])), {}

    def modulate(self, normed: Tensor, zq: Tensor) -> Tensor:
        """Scales and shifts ``normed`` (N, C, F, H, W) in place, by ``zq`` at its own frames, rows and columns."""
        normed.mul_(self.conv_y.conv(zq))
        normed.add_(self.conv_b.conv(zq))
        return normed


def resized(zq: Tensor, shape: Sequence[int]) -> Tensor:
    """Latents (N, C_z, T, h, w) at ``shape`` (F, H, W), nearest; the first of an odd number of frames for itself."""
    if shape[0] > 1 and shape[0] % 2 == 1:
        first = functional.interpolate(zq[:, :, :1], size=(1, *shape[1:]))
        rest = functional.interpolate(zq[:, :, 1:], size=(shape[0] - 1, *shape[1:]))
        return torch.cat([first, rest], dim=2)
    return functional.interpolate(zq, size=tuple(shape))


def use_lean_norms(model: nn.Module) -> None:
    """Replaces the spatial norms of a frozen CogVideoX VAE in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CogVideoXSpatialNorm3D):
                setattr(parent, name, LeanSpatialNorm(child))
