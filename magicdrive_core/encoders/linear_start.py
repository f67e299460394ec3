"""Fresh weights with which a small CogVideoX VAE already is the best linear code of the pictures.

Training from random weights spends its first minutes on finding out what principal component analysis computes in a
second. So the encoder starts as the principal components of 8x8 patches, level by level (a strided convolution holds
those of 2x2 neighbours), and the decoder as the least-squares way back. Its convolutions follow nearest-neighbour
upsampling, cannot tell the pixels of one cell apart, and reach across its border instead: hence least squares, fitted
on the level below as it comes out. Residual branches start at zero. Measured: docs/log.md.

All of it needs norms of one group: a large constant pair of channels then makes the last norms nearly linear maps,
and pairs of opposite sign make SiLU one, since silu(x) - silu(-x) = x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magicdrive_core.errors import MagicDriveError

CONSTANT = 32.0  # of the pair that outweighs the picture in the last norms
WHITENING = 0.85  # latent channel k is divided by its deviation to this power: 0 keeps the pictures' scale, 1 is white
RIDGE = 1e-5  # share of the mean square, added to the diagonal
LOG_VARIANCE = -6.0  # of the posterior: its noise hides nothing yet


@torch.no_grad()
def start_linear(model: Any, frames: Tensor) -> None:
    """Overwrites fresh weights of an ``AutoencoderKLCogVideoX`` in place.

    Args:
        model: with norms of one group.
        frames: (N, 3, H, W) in [-1, 1], height and width multiples of 8.

    Raises:
        MagicDriveError: all frames are of one colour, the same in all of them.
    """
    mean = frames.mean(dim=(0, 2, 3))
    if (frames - mean[:, None, None]).abs().max() < 1 / 255:
        raise MagicDriveError("all pictures for the VAE are of one colour", "look at the pictures of data.root")
    for name, weight in model.named_parameters():
        if ".conv2.conv." in name:
            weight.zero_()
    _start_encoder(model.encoder, frames, mean)
    latents = model.encode(frames[:, :, None]).latent_dist.mean[:, :, 0]
    _start_decoder(model.decoder, frames, mean, latents)


def _start_encoder(encoder: Any, frames: Tensor, mean: Tensor) -> None:
    _set(encoder.conv_in.conv, torch.eye(3), -mean)
    features = frames - mean[:, None, None]
    for block in encoder.down_blocks[:-1]:
        _widen(block)
        convolution = block.downsamplers[0].conv
        patches = functional.pixel_unshuffle(features, 2)  # channel, row, column
        axes = _principal(patches, convolution.out_channels)
        kernel = torch.zeros_like(convolution.weight)
        kernel[: axes.shape[1], : features.shape[1], :2, :2] = axes.T.unflatten(1, (-1, 2, 2))
        convolution.weight.copy_(kernel)
        convolution.bias.zero_()
        features = torch.einsum("pc,nphw->nchw", axes, patches)
    count = len(encoder.conv_out.conv.bias) // 2
    axes = _principal(features, count)
    deviation = torch.einsum("pc,nphw->nchw", axes, features).square().mean(dim=(0, 2, 3)).sqrt()
    axes = axes * deviation**-WHITENING
    axes /= (axes.T @ _covariance(features) @ axes).diagonal().mean().sqrt()
    scale = _signed_pairs(encoder.down_blocks[-1].resnets[0].conv_shortcut, axes.T)
    means = scale * torch.cat([torch.eye(count), -torch.eye(count)], dim=1)
    _set(encoder.conv_out.conv, torch.cat([means, torch.zeros_like(means)]))
    encoder.conv_out.conv.bias[count:] = LOG_VARIANCE


def _start_decoder(decoder: Any, frames: Tensor, mean: Tensor, latents: Tensor) -> None:
    _set(decoder.conv_in.conv, torch.eye(latents.shape[1]))
    features, factor = latents, 8
    for block, after in zip(decoder.up_blocks[:-1], decoder.up_blocks[1:], strict=True):
        _widen(block)
        factor //= 2
        target = functional.pixel_unshuffle(frames - mean[:, None, None], factor)
        if factor > 1:
            axes = _principal(target, after.resnets[0].out_channels)
            target = torch.einsum("pc,nphw->nchw", axes, target)
        up = functional.interpolate(features, scale_factor=2.0, mode="nearest")
        kernel, bias = _least_squares(up, target)
        _set(block.upsamplers[0].conv, kernel, bias)
        features = functional.conv2d(up, kernel, bias, padding=1)
    scale = _signed_pairs(decoder.up_blocks[-1].resnets[0].conv_shortcut, torch.eye(3))
    norm = decoder.norm_out
    norm.conv_y.conv.weight.zero_()
    norm.conv_y.conv.bias.fill_(1.0)
    norm.conv_b.conv.weight.zero_()
    norm.conv_b.conv.bias.zero_()
    _set(decoder.conv_out.conv, scale * torch.cat([torch.eye(3), -torch.eye(3)], dim=1), mean)


def _widen(block: Any) -> None:
    """Makes a block's first residual connection the identity, as far as the widths go."""
    first = block.resnets[0]
    if first.in_channels != first.out_channels:
        _set(first.conv_shortcut, torch.eye(min(first.in_channels, first.out_channels)))


def _signed_pairs(shortcut: Any, matrix: Tensor) -> float:
    """Channels (matrix x, -matrix x, constant, -constant); returns what the norm after them divides by, about."""
    rows = 2 * len(matrix)
    _set(shortcut, torch.cat([matrix, -matrix, torch.zeros(2, matrix.shape[1])]))
    shortcut.bias[rows : rows + 2] = torch.tensor([CONSTANT, -CONSTANT])
    return float(CONSTANT * (2 / len(shortcut.bias)) ** 0.5)


def _set(convolution: Any, kernel: Tensor, bias: Tensor | float = 0.0) -> None:
    """First rows of a convolution: a kernel (out, in, 3, 3), or a matrix (out, in) at its centre, for the present."""
    rows, columns = kernel.shape[:2]
    weight = convolution.weight
    weight[:rows] = 0
    present = weight[:, :, -1] if weight.ndim == 5 else weight
    centre = present.shape[-1] // 2
    view = present if kernel.ndim == 4 else present[:, :, centre, centre]
    view[:rows, :columns] = kernel
    convolution.bias[:rows] = bias


def _covariance(features: Tensor) -> Tensor:
    """(C, C) second moments of features (N, C, H, W)."""
    values = features.double().transpose(0, 1).flatten(1)
    return (values @ values.T / values.shape[1]).float()


def _principal(features: Tensor, count: int) -> Tensor:
    """(C, count or fewer) orthonormal axes of most variance first, signs fixed."""
    axes = torch.linalg.eigh(_covariance(features).double()).eigenvectors.flip(1)[:, :count]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return (axes * signs).float()


def _least_squares(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel (out, in, 3, 3) and bias of the convolution that comes nearest to the target."""
    size = 9 * features.shape[1] + 1
    gram, moments = (
        torch.zeros(size, size, dtype=torch.float64),
        torch.zeros(size, target.shape[1], dtype=torch.float64),
    )
    for source, wanted in zip(features, target, strict=True):  # one picture at a time, for memory
        columns = functional.unfold(source[None].double(), 3, padding=1)[0]
        columns = torch.cat([columns, torch.ones_like(columns[:1])])
        gram += columns @ columns.T
        moments += columns @ wanted.flatten(1).double().T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(gram, moments).float().T
    return solution[:, :-1].unflatten(1, (-1, 3, 3)), solution[:, -1]
