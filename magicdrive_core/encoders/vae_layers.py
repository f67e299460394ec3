"""The VAE's causal 3D convolutions as 2D ones, for CPUs.

torch computes small 3D convolutions without oneDNN (measured: 8 to 25 times slower for 8 to 16 channels at 112x200),
and a single frame, which stands for its own past, is convolved three times with itself. Summing the kernel's frames for
single frames, and folding them into the channels for clips, gives 2D convolutions of the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from torch import Tensor, nn
from torch.nn import functional

# torch gives a 3D convolution to oneDNN above this many values along batch, channels, frames and rows together.
ONEDNN_VALUES = 20480


class PlaneConv3d(nn.Module):
    """Weights of a ``CogVideoXCausalConv3d``'s convolution under the same names."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = tuple(int(side) for side in conv.padding[1:])

    def single(self, frame: Tensor) -> Tensor:
        """A still of one frame, (N, C, 1, H, W): every kernel frame meets the same picture."""
        weight = self.weight.sum(dim=2)
        return functional.conv2d(frame[:, :, 0], weight, self.bias, padding=self.padding)[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, F, H, W) -> (N, C_out, F - kernel frames + 1, H, W)."""
        kernel = self.weight.shape[2]
        if kernel > 1 and x.shape[:4].numel() > ONEDNN_VALUES:
            return functional.conv3d(x, self.weight, self.bias, padding=(0, *self.padding))
        N, _, F, H, W = x.shape
        F = F - kernel + 1
        windows = torch.cat([x[:, :, shift : shift + F] for shift in range(kernel)], dim=1) if kernel > 1 else x
        planes = windows.transpose(1, 2).reshape(N * F, -1, H, W)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        out = functional.conv2d(planes, weight, self.bias, padding=self.padding)
        return out.reshape(N, F, -1, H, W).transpose(1, 2)


class PlaneCausalConv3d(nn.Module):
    """Stands in for a ``CogVideoXCausalConv3d``: the same values to rounding, state-dict names and cache."""

    def __init__(self, causal: CogVideoXCausalConv3d) -> None:
        super().__init__()
        self.conv = PlaneConv3d(causal.conv)
        self.past = causal.time_kernel_size - 1

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(N, C, F, H, W) and the last frames of the chunk before; without one, the first frame repeats."""
        if self.past == 0:
            return self.conv(inputs), None
        if conv_cache is None and inputs.shape[2] == 1:
            return self.conv.single(inputs), inputs.expand(-1, -1, self.past, -1, -1)
        if conv_cache is None:
            conv_cache = inputs[:, :, :1].expand(-1, -1, self.past, -1, -1)
        x = torch.cat([conv_cache, inputs], dim=2)
        return self.conv(x), x[:, :, -self.past :].clone()


def use_planes(model: nn.Module) -> None:
    """Replaces the causal convolutions of a CogVideoX VAE in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CogVideoXCausalConv3d):
                setattr(parent, name, PlaneCausalConv3d(child))


# The VAE decoder's spatial norms with three full activations alive instead of six, and no caches that nobody reads.


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
