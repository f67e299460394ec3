"""The VAE decoder in horizontal stripes: the frames of the whole picture, without seams, in a part of the memory.

One layer after the other works through the whole picture, stripe by stripe. So group norm has the statistics of the
whole picture, a convolution reads a row of its neighbours on either side, and nothing is computed twice but those rows.
Alive at full size are a block's input and the output of its first convolution only, where diffusers' decoder has more
than a dozen such tensors. The frames that causal convolutions keep for the next group wait in main memory.

At 848x1600 in bf16 those two are 6.25 and 3.13 GB (9 frames of 256 and 128 channels), and what waits is 10 GB.

Shapes: N videos, C channels, F frames, H, W rows and columns of an activation; z (N, C_z, T, h, w) latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from magicdrive_core.encoders.vae_layers import LeanSpatialNorm, resized

Piece = Callable[[slice], Tensor]  # rows of a layer's input, made when they are asked for


class StripedDecoder:
    """Decodes one video's groups of latent frames in their order; keeps what one group leaves for the next.

    Args:
        decoder: diffusers' ``CogVideoXDecoder3D`` with lean norms; the channels of its blocks never rise.
        rows: height of a stripe at full size; smaller layers take as many pixels at a time.
        upscaling: pixels of a latent's side.
    """

    def __init__(self, decoder: Any, rows: int, upscaling: int) -> None:
        self._decoder, self._rows, self._upscaling = decoder, rows, upscaling
        self._places = 0
        self._past: dict[tuple[nn.Module, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Frames (N, 3, F, H, W) of a group of latent frames."""
        decoder, self._places = self._decoder, self._rows * z.shape[-1] * self._upscaling
        x = self._convolved(decoder.conv_in, z, lambda rows: z[..., rows, :])
        for block in (decoder.mid_block, *decoder.up_blocks):
            for resnet in block.resnets:
                x = self._through(resnet, x, z)
            for upsampler in getattr(block, "upsamplers", None) or ():
                x = self._enlarged(upsampler, x)
        return self._convolved(decoder.conv_out, x, self._normed(decoder.norm_out, decoder.conv_act, x, z))

    def _through(self, resnet: Any, x: Tensor, z: Tensor) -> Tensor:
        """A residual block; its result takes the place of ``x``."""
        hidden = self._convolved(resnet.conv1, x, self._normed(resnet.norm1, resnet.nonlinearity, x, z))
        if resnet.in_channels != resnet.out_channels:
            for rows in self._stripes(x):
                x[:, : resnet.out_channels, :, rows] = resnet.conv_shortcut(x[..., rows, :])
            x = x[:, : resnet.out_channels]
        self._convolved(resnet.conv2, hidden, self._normed(resnet.norm2, resnet.nonlinearity, hidden, z), add_to=x)
        return x

    def _convolved(self, conv: Any, x: Tensor, piece: Piece, add_to: Tensor | None = None) -> Tensor:
        """A causal convolution of 3x3x3 over what ``piece`` makes of ``x``."""
        height, out = x.shape[-2], add_to
        for number, rows in enumerate(self._stripes(x)):
            wide = _with_neighbours(rows, height)
            inputs = piece(wide)
            past = self._past.get((conv, number))
            part, kept = conv(inputs, conv_cache=None if past is None else past.to(inputs.device))
            self._keep((conv, number), kept)
            part = part[..., rows.start - wide.start :, :][..., : rows.stop - rows.start, :]
            if out is None:
                out = part.new_empty(*part.shape[:3], height, part.shape[-1])
            if add_to is None:
                out[..., rows, :] = part
            else:
                out[..., rows, :] += part
        assert out is not None
        return out

    def _keep(self, key: tuple[nn.Module, int], frames: Tensor) -> None:
        """Frames for the next group, in main memory: stripes are the same ones then, neighbours' rows included."""
        if key not in self._past:
            self._past[key] = torch.empty_like(
                frames,
                device="cpu",
                memory_format=torch.contiguous_format,
                pin_memory=frames.device.type not in ("cpu", "meta"),
            )
        if not frames.is_meta:  # of a plan: there is nothing to copy
            self._past[key].copy_(frames)

    def _normed(self, norm: LeanSpatialNorm, activation: nn.Module, x: Tensor, z: Tensor) -> Piece:
        """``x`` as the next convolution takes it, by rows."""
        scale, shift = self._group_norm(norm.norm_layer, x)

        def piece(rows: slice) -> Tensor:
            out = torch.addcmul(shift, x[..., rows, :], scale).to(x.dtype)
            F, H, W = x.shape[-3:]
            own = torch.arange(rows.start, rows.stop, device=z.device) * z.shape[-2] // H
            return activation(norm.modulate(out, resized(z[..., own, :], (F, len(own), W))))

        return piece

    def _group_norm(self, layer: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (N, C, 1, 1, 1) float32 that normalise the whole of ``x``."""
        N, C = x.shape[:2]
        means, squares, weights = [], [], []
        for rows in self._stripes(x):
            stripe = x[..., rows, :].float().reshape(N, layer.num_groups, -1)
            variance, mean = torch.var_mean(stripe, dim=-1, correction=0)
            means.append(mean.double())
            squares.append(variance.double() + mean.double().square())
            weights.append((rows.stop - rows.start) / x.shape[-2])
        mean = sum(weight * each for weight, each in zip(weights, means, strict=True))
        square = sum(weight * each for weight, each in zip(weights, squares, strict=True))
        deviation = (square - mean.square()).clamp_min(0).add(layer.eps).sqrt()
        mean, deviation = (each.repeat_interleave(C // layer.num_groups, dim=1) for each in (mean, deviation))
        scale = layer.weight.double() / deviation
        shift = layer.bias.double() - mean * scale
        return tuple(each.float()[..., None, None, None] for each in (scale, shift))

    def _enlarged(self, upsampler: Any, x: Tensor) -> Tensor:
        """Twice the rows and columns, and the frames where the layer says so."""
        height = x.shape[-2]
        out: Tensor | None = None
        for rows in self._stripes(x, enlarged=2):
            wide = _with_neighbours(rows, height)
            part = upsampler(x[..., wide, :])[..., 2 * (rows.start - wide.start) :, :]
            part = part[..., : 2 * (rows.stop - rows.start), :]
            if out is None:
                out = part.new_empty(*part.shape[:3], 2 * height, part.shape[-1])
            out[..., 2 * rows.start : 2 * rows.stop, :] = part
        assert out is not None
        return out

    def _stripes(self, x: Tensor, enlarged: int = 1) -> Iterator[slice]:
        """The rows of ``x``, as many at a time as make the places of a stripe once they are enlarged."""
        height, rows = x.shape[-2], max(1, self._places // (x.shape[-1] * enlarged**2))
        return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def _with_neighbours(rows: slice, height: int) -> slice:
    """The rows that a kernel of three reaches; beyond the picture there are none, and it pads with zeros."""
    return slice(max(0, rows.start - 1), min(height, rows.stop + 1))
