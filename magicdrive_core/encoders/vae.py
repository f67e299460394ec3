"""The CogVideoX VAE: videos to posterior moments, latents, and back to frames as a stream.

Shapes: N videos (views are videos of their own), F frames, T latent frames, C latent channels; H, W pixels and
h, w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.memory import keep_freed

TIME_STRIDE, SPACE_STRIDE = 4, 8
PUBLISHED_SCALING = 1.15258426
BUILD_HINT = (
    "`dvc repro encoders` builds the demo's; else put CogVideoX-2b's vae folder there and set vae.build to null"
)
WHOLE_CLIP = 1 << 30  # frames: a chunk longer than any clip


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T, h, w) of a video's latents: 8n+1 frames give 2n+1, 8n give 2n; height and width shrink by 8."""
    return (frames - 1) // TIME_STRIDE + 1, height // SPACE_STRIDE, width // SPACE_STRIDE


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Frames (N, F, H, W, 3) of 0..255 as the VAE's input: (N, 3, F, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def sample_moments(
    moments: Tensor, generator: torch.Generator | None = None, chunks: list[int] | None = None
) -> Tensor:
    """A sample of the posterior; times the scaling factor it is a latent.

    Args:
        moments: (..., 2C, T, h, w): mean, then log-variance, along the channels.
        generator: on the device of ``moments``; None gives the mean.
        chunks: latent frames of each encoder chunk (sums to T); noise is drawn chunk by chunk for each video in
            turn, in the order of the published system. None: for all at once.

    Returns:
        (..., C, T, h, w) float32.
    """
    mean, log_variance = moments.float().chunk(2, dim=-4)
    if generator is None:
        return mean
    draw = partial(torch.randn, generator=generator, device=mean.device)
    if chunks is None:
        noise = draw(mean.shape)
    else:
        C, _, h, w = mean.shape[-4:]
        videos = mean.shape[:-4].numel()
        noise = torch.stack([torch.cat([draw((C, t, h, w)) for t in chunks], dim=1) for _ in range(videos)])
        noise = noise.reshape(mean.shape)
    # The bounds are those of diffusers' posterior: they keep exp() finite.
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return mean + deviation * noise


class Vae:
    """A frozen diffusers ``AutoencoderKLCogVideoX``. Use ``Vae.load``."""

    def __init__(
        self,
        model: Any,
        *,
        scaling_factor: float,
        chunk_frames: int | None = 8,
        stripe_rows: int | None = None,
    ) -> None:
        from magicdrive_core.encoders.vae_layers import use_lean_norms  # imports diffusers, which takes seconds

        self.model = model.eval().requires_grad_(False)
        use_lean_norms(self.model)
        self.scaling_factor = scaling_factor
        self.chunk_frames = chunk_frames
        self.stripe_rows = stripe_rows
        # diffusers encodes in chunks of this many frames, the first taking the odd one; group norm's statistics are
        # those of a chunk, so that chunks and whole clips give different latents (golden notes, section 2).
        self.model.num_sample_frames_batch_size = chunk_frames or WHOLE_CLIP

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        scaling_factor: float,
        chunk_frames: int | None = 8,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stripe_rows: int | None = None,
    ) -> Vae:
        """Reads a from_pretrained folder.

        Args:
            folder: holds config.json and the weights.
            scaling_factor: latents = sample * factor.
            chunk_frames: frames of an encoder chunk; None: the whole clip in one go.
            device: where the model runs.
            dtype: of the weights and activations; moments and latents are float32 always.
            stripe_rows: decode in stripes of this height (``stripes.py``): the same to rounding, in less memory;
                None: whole pictures.

        Raises:
            MagicDriveError: the folder holds no VAE.
        """
        # Imported here: diffusers takes seconds, and readers of cached latents need none of it.
        from diffusers import AutoencoderKLCogVideoX

        from magicdrive_core.encoders.vae_layers import use_planes

        try:
            model = AutoencoderKLCogVideoX.from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise MagicDriveError(f"vae.path: {folder} holds no readable CogVideoX VAE: {reason}", BUILD_HINT) from None
        if torch.device(device).type == "cpu":
            use_planes(model)
            keep_freed()
        return cls(model.to(device), scaling_factor=scaling_factor, chunk_frames=chunk_frames, stripe_rows=stripe_rows)

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.model.config.latent_channels)

    @torch.no_grad()
    def moments(self, video: Tensor, micro_batch: int = 1) -> Tensor:
        """Posterior mean and log-variance: (N, 3, F, H, W) in [-1, 1] -> (N, 2C, T, h, w) float32 on its device.

        ``micro_batch`` videos are encoded at a time: memory holds the activations of so many.
        """
        encoded = [
            self.model.encode(part.to(self.model.device, self.model.dtype)).latent_dist.parameters.float()
            for part in video.split(micro_batch)
        ]
        return torch.cat(encoded).to(video.device)

    def latents(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A posterior sample of (..., 2C, T, h, w) times the scaling factor, or the mean without ``generator``.

        Noise is drawn video by video and chunk by chunk, as the published system does.
        """
        return self.scaling_factor * sample_moments(moments, generator, self._latent_chunks(moments.shape[-3]))

    def decode(self, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        """Frames of scaled latents (N, C, T, h, w), as a stream of (N, frames, H, W, 3) of at most 9 frames each."""
        for group in self.decode_groups(latents):
            pixels = group.add_(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
            yield pixels.permute(0, 2, 3, 4, 1).cpu().numpy()

    def decode_groups(self, latents: Tensor) -> Iterator[Tensor]:
        """The same before rounding: (N, 3, frames, H, W) float32, about [-1, 1], two latent frames at a time.

        An odd latent frame goes with the first two, as in diffusers.
        """
        z = (latents / self.scaling_factor).to(self.model.device, self.model.dtype)
        decode, start = self._decoder(), 0
        for length in _groups(z.shape[2], self.model.num_latent_frames_batch_size):
            part = z[:, :, start : start + length]
            if self.model.post_quant_conv is not None:
                part = self.model.post_quant_conv(part)
            start += length
            yield decode(part).float()

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        """Decodes the groups of one video in their order."""
        if self.stripe_rows is not None:
            from magicdrive_core.encoders.striped_decode import StripedDecoder  # imports diffusers

            return StripedDecoder(self.model.decoder, self.stripe_rows, SPACE_STRIDE)
        cache = None

        @torch.no_grad()
        def whole(part: Tensor) -> Tensor:
            nonlocal cache
            frames, cache = self.model.decoder(part, conv_cache=cache)
            return frames

        return whole

    def _latent_chunks(self, latent_frames: int) -> list[int]:
        chunk = self.model.num_sample_frames_batch_size
        return _groups(latent_frames, latent_shape(chunk, 0, 0)[0])


def _groups(frames: int, size: int) -> list[int]:
    """Lengths of groups of ``size`` frames, the first of which takes the remainder too."""
    count = max(frames // size, 1)
    return [frames - size * (count - 1)] + [size] * (count - 1)
