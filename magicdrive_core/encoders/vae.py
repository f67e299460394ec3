"""The CogVideoX VAE: videos to posterior moments, moments to latents, and latents to frames as a stream.

Shapes: N videos (each view is one), F frames, T latent frames, C latent channels, H, W pixels, h, w rows and columns of
latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.bundle import verify_encoder
from magicdrive_core.utils.memory import keep_freed

TIME_STRIDE, SPACE_STRIDE = 4, 8  # frames and pixels for one latent frame, row or column
PUBLISHED_SCALING = 1.15258426
BUILD_HINT = "`dvc repro encoders` builds the demo's; or put CogVideoX-2b's vae folder there and set vae.build to null"
WHOLE_CLIP = 1 << 30  # frames of a chunk that is longer than any clip


def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Computes the shape of a video's latents: 8n+1 frames give 2n+1, 8n give 2n; height and width shrink by 8.

    Args:
        frames: F.
        height: H in pixels.
        width: W in pixels.

    Returns:
        T, h, w.
    """
    return (frames - 1) // TIME_STRIDE + 1, height // SPACE_STRIDE, width // SPACE_STRIDE


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Converts frames to the VAE's input.

    Args:
        frames: (N, F, H, W, 3) in [0, 255].

    Returns:
        (N, 3, F, H, W), float32 in [-1, 1].
    """
    return rearrange(torch.from_numpy(frames), "n f h w c -> n c f h w").float().div_(127.5).sub_(1.0)


def sample_moments(
    moments: Tensor, generator: torch.Generator | None = None, chunks: list[int] | None = None
) -> Tensor:
    """Samples the posterior; times the scaling factor the sample is a latent.

    Args:
        moments: (..., 2C, T, h, w): mean, then log-variance, along the channels.
        generator: random numbers on the device of ``moments``; None: the mean is returned.
        chunks: latent frames of each encoder chunk, T in all. Noise is drawn chunk by chunk for one video after the
            other, in the order of the published system. None: noise is drawn for everything at once.

    Returns:
        (..., C, T, h, w) in float32.
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
    # The bounds are those of diffusers' posterior; they keep exp() finite.
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return mean + deviation * noise


class Vae:
    """A frozen diffusers ``AutoencoderKLCogVideoX``; see ``Vae.load`` for the arguments.

    Args:
        model: the diffusers model, changed in place.
        scaling_factor: latents = sample * factor.
        chunk_frames: frames of an encoder chunk; None: the whole clip.
        stripe_rows: pixel rows of a stripe in decoding; None: whole frames.
    """

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
        # diffusers encodes in chunks of this many frames; the first one takes the odd frame too. Group norm sees one
        # chunk at a time, so that chunks and whole clips give different latents (golden notes, section 2).
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
            chunk_frames: frames of an encoder chunk; None: the whole clip at once.
            device: where the model runs.
            dtype: data type of the weights and activations; moments and latents are always float32.
            stripe_rows: pixel rows that are decoded at a time (``striped_decode``): equal to rounding, in less memory;
                None: whole frames.

        Returns:
            The frozen VAE; on a CPU its causal convolutions are computed as 2D ones.

        Raises:
            MagicDriveError: the folder holds no readable CogVideoX VAE, or differs from the bundle that it belongs to.
        """
        # Imported here because diffusers takes seconds to import, and readers of cached latents do not need it.
        from diffusers import AutoencoderKLCogVideoX

        from magicdrive_core.encoders.vae_layers import use_plane_convolutions

        verify_encoder(Path(folder))
        try:
            model = AutoencoderKLCogVideoX.from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise MagicDriveError(f"vae.path: {folder} holds no readable CogVideoX VAE: {reason}", BUILD_HINT) from None
        if torch.device(device).type == "cpu":
            use_plane_convolutions(model)
            keep_freed()
        return cls(model.to(device), scaling_factor=scaling_factor, chunk_frames=chunk_frames, stripe_rows=stripe_rows)

    @property
    def latent_channels(self) -> int:
        """Number of latent channels C."""
        return int(self.model.config.latent_channels)

    @torch.no_grad()
    def moments(self, video: Tensor, micro_batch: int = 1) -> Tensor:
        """Encodes videos to the mean and log-variance of the posterior.

        Args:
            video: (N, 3, F, H, W) in [-1, 1].
            micro_batch: videos that are encoded at a time; memory holds their activations.

        Returns:
            (N, 2C, T, h, w) in float32, on the device of ``video``.
        """
        encoded = [
            self.model.encode(part.to(self.model.device, self.model.dtype)).latent_dist.parameters.float()
            for part in video.split(micro_batch)
        ]
        return torch.cat(encoded).to(video.device)

    def latents(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples scaled latents; noise is drawn video by video and chunk by chunk, as the published system does.

        Args:
            moments: (..., 2C, T, h, w), from ``moments``.
            generator: random numbers on the device of ``moments``; None: the scaled mean is returned.

        Returns:
            (..., C, T, h, w) in float32.
        """
        return self.scaling_factor * sample_moments(moments, generator, self._latent_chunks(moments.shape[-3]))

    def decode(self, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
        """Decodes scaled latents to frames, a group of latent frames at a time.

        Args:
            latents: (N, C, T, h, w).

        Yields:
            uint8 frames (N, F, H, W, 3), at most 9 of them at a time.
        """
        for group in self.decode_groups(latents):
            pixels = group.add_(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
            yield rearrange(pixels, "n c f h w -> n f h w c").cpu().numpy()

    def decode_groups(self, latents: Tensor) -> Iterator[Tensor]:
        """Decodes scaled latents to pixels before rounding, two latent frames at a time.

        An odd latent frame is decoded together with the first two, as in diffusers.

        Args:
            latents: (N, C, T, h, w).

        Yields:
            Pixels (N, 3, F, H, W) in float32, about [-1, 1].
        """
        z = (latents / self.scaling_factor).to(self.model.device, self.model.dtype)
        decode, start = self._decoder(), 0
        for length in _group_lengths(z.shape[2], self.model.num_latent_frames_batch_size):
            part = z[:, :, start : start + length]
            if self.model.post_quant_conv is not None:
                part = self.model.post_quant_conv(part)
            start += length
            yield decode(part).float()

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        """Returns a function that decodes the groups of one video one after the other and keeps state between them."""
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
        """Returns the latent frames of each encoder chunk of a video."""
        chunk = self.model.num_sample_frames_batch_size
        return _group_lengths(latent_frames, latent_shape(chunk, 0, 0)[0])


def _group_lengths(frames: int, size: int) -> list[int]:
    """Splits ``frames`` into groups of ``size``; the first one takes the remainder too."""
    count = max(frames // size, 1)
    return [frames - size * (count - 1)] + [size] * (count - 1)
