"""The VAE's 3D convolutions as 2D ones, where torch would otherwise take its slow path on a CPU.

torch computes a small 3D convolution without oneDNN (measured: 8 to 25 times slower for 8 to 16 channels at 112x200).
Folding the kernel's frames into the channels gives a 2D convolution of the same numbers, which is always fast.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from torch import Tensor, nn
from torch.nn import functional

# torch gives a 3D convolution to oneDNN above this many values along batch, channels, frames and rows together.
ONEDNN_VALUES = 20480


class PlaneConv3d(nn.Module):
    """Stands in for a stride-1 3D convolution that is not padded in time; weights and their names stay the same.

    The values equal the 3D convolution's to rounding (about 1e-6 of their size).
    """

    def __init__(self, conv: CogVideoXSafeConv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, F, H, W) -> (N, C_out, F - kernel frames + 1, H', W')."""
        kernel = self.weight.shape[2]
        if x.shape[:4].numel() > ONEDNN_VALUES and kernel > 1:
            return functional.conv3d(x, self.weight, self.bias, padding=self.padding)
        N, _, F, H, W = x.shape
        F = F - kernel + 1
        if kernel == 1 and self.weight.shape[3:].numel() == 1:  # frames can be stacked as rows without a copy
            flat = functional.conv2d(x.reshape(N, -1, F * H, W), self.weight[:, :, 0], self.bias)
            return flat.reshape(N, -1, F, H, W)
        windows = torch.cat([x[:, :, shift : shift + F] for shift in range(kernel)], dim=1)
        planes = windows.transpose(1, 2).reshape(N * F, -1, H, W)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        out = functional.conv2d(planes, weight, self.bias, padding=self.padding[1:])
        return out.reshape(N, F, *out.shape[1:]).transpose(1, 2)


def use_planes(model: nn.Module) -> None:
    """Replaces the 3D convolutions of a CogVideoX VAE in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CogVideoXSafeConv3d):
                setattr(parent, name, PlaneConv3d(child))
