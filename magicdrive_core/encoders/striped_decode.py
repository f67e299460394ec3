"""The VAE decoder in horizontal stripes: the frames that whole pictures give, without seams, in less memory.

Each layer works through the whole picture, stripe by stripe, before the next layer starts. So group norm has the
statistics of the whole picture, a convolution reads one neighbouring row on either side, and only those rows are
computed twice. At full size only a block's input and the output of its first convolution are in memory, where
diffusers' decoder holds more than a dozen such tensors. Frames that causal convolutions keep for the next group wait in
main memory.

At 848x1600 in bf16 the two tensors take 6.25 and 3.13 GB (9 frames of 256 and 128 channels); 10 GB wait in main memory.

Shapes: N videos, C channels, F frames, H, W rows and columns of an activation; z (N, C_z, T, h, w) latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from magicdrive_core.encoders.vae_layers import LeanSpatialNorm, resized

Rows = Callable[[slice], Tensor]  # computes some rows of a layer's input


class StripedDecoder:
    """Decodes the groups of latent frames of one video in order, and keeps what each group leaves for the next.

    Args:
        decoder: diffusers' ``CogVideoXDecoder3D`` with lean norms, whose blocks never increase the channels.
        rows: pixel rows of a stripe at full size; layers of lower resolution take as many pixels at a time.
        upscaling: pixels on the side of a latent.
    """

    def __init__(self, decoder: Any, rows: int, upscaling: int) -> None:
        self._decoder, self._rows, self._upscaling = decoder, rows, upscaling
        self._stripe_pixels = 0
        self._past: dict[tuple[nn.Module, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Decodes the next group of latent frames of the video.

        Args:
            z: (N, C_z, T, h, w) latents divided by the scaling factor; groups follow one another in time.

        Returns:
            Pixels (N, 3, F, H, W) in about [-1, 1], in the decoder's dtype.
        """
        decoder, self._stripe_pixels = self._decoder, self._rows * z.shape[-1] * self._upscaling
        x = self._convolved(decoder.conv_in, z, lambda rows: z[..., rows, :])
        for block in (decoder.mid_block, *decoder.up_blocks):
            for resnet in block.resnets:
                x = self._resnet(resnet, x, z)
            for upsampler in getattr(block, "upsamplers", None) or ():
                x = self._enlarged(upsampler, x)
        return self._convolved(decoder.conv_out, x, self._normed(decoder.norm_out, decoder.conv_act, x, z))

    def _resnet(self, resnet: Any, x: Tensor, z: Tensor) -> Tensor:
        """Applies a residual block to ``x`` (N, C, F, H, W), in place as far as the channels go."""
        hidden = self._convolved(resnet.conv1, x, self._normed(resnet.norm1, resnet.nonlinearity, x, z))
        if resnet.in_channels != resnet.out_channels:
            for rows in self._stripes(x):
                x[:, : resnet.out_channels, :, rows] = resnet.conv_shortcut(x[..., rows, :])
            x = x[:, : resnet.out_channels]
        self._convolved(resnet.conv2, hidden, self._normed(resnet.norm2, resnet.nonlinearity, hidden, z), add_to=x)
        return x

    def _convolved(self, conv: Any, x: Tensor, rows_of: Rows, add_to: Tensor | None = None) -> Tensor:
        """Applies a causal convolution with a 3x3x3 kernel, stripe by stripe.

        Args:
            conv: the convolution.
            x: its input before ``rows_of``, (N, C, F, H, W).
            rows_of: computes some rows of its input from ``x``.
            add_to: tensor to which the result is added in place; None: a new one.

        Returns:
            (N, C_out, F, H, W).
        """
        height, out = x.shape[-2], add_to
        for number, rows in enumerate(self._stripes(x)):
            wide = _with_neighbours(rows, height)
            inputs = rows_of(wide)
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
        """Copies frames to main memory for the next group, which has the same stripes and neighbouring rows."""
        if key not in self._past:
            self._past[key] = torch.empty_like(
                frames,
                device="cpu",
                memory_format=torch.contiguous_format,
                pin_memory=frames.device.type not in ("cpu", "meta"),
            )
        if not frames.is_meta:  # the memory planner runs on meta tensors, which hold nothing
            self._past[key].copy_(frames)

    def _normed(self, norm: LeanSpatialNorm, activation: nn.Module, x: Tensor, z: Tensor) -> Rows:
        """Returns a function that computes some rows of the normalised and activated ``x``."""
        scale, shift = self._group_norm(norm.norm_layer, x)

        def rows_of(rows: slice) -> Tensor:
            out = torch.addcmul(shift, x[..., rows, :], scale).to(x.dtype)
            F, H, W = x.shape[-3:]
            own = torch.arange(rows.start, rows.stop, device=z.device) * z.shape[-2] // H
            return activation(norm.modulate(out, resized(z[..., own, :], (F, len(own), W))))

        return rows_of

    def _group_norm(self, layer: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and shift (N, C, 1, 1, 1) in float32 that normalise all of ``x`` (N, C, F, H, W).

        The variance is E[x^2] - E[x]^2 over all stripes, weighted by their heights, in double precision.
        """
        C = x.shape[1]
        means, squares, weights = [], [], []
        for rows in self._stripes(x):
            stripe = rearrange(x[..., rows, :].float(), "n (g c) f h w -> n g (c f h w)", g=layer.num_groups)
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
        return tuple(rearrange(each.float(), "n c -> n c 1 1 1") for each in (scale, shift))

    def _enlarged(self, upsampler: Any, x: Tensor) -> Tensor:
        """Applies an upsampler, which doubles rows and columns, and frames if it is set to."""
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
        """Yields slices of the rows of ``x`` that hold the pixels of a stripe after a layer enlarges them."""
        height, rows = x.shape[-2], max(1, self._stripe_pixels // (x.shape[-1] * enlarged**2))
        return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def _with_neighbours(rows: slice, height: int) -> slice:
    """Returns the rows that a kernel of 3 rows reads; beyond the picture it pads with zeros."""
    return slice(max(0, rows.start - 1), min(height, rows.stop + 1))
