"""Rectified flow: straight paths from data to noise. Mathematics only, no network.

    x_t = (1 - t/1000) x_0 + (t/1000) noise        the path, t in [0, 1000]
    v   = x_0 - noise                              its velocity towards the data, what a network learns

Tensors are (B, ..., T, H, W): samples first, latent frames third from last. Liu et al., "Flow straight and fast"
(2022); the size-aware shift of t is that of Esser et al., "Scaling rectified flow transformers" (2024), with the
frame count of the golden notes, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VideoShape = tuple[int, int, int]  # frames, height and width in pixels of the video that latents stand for

NOISE = 1000.0  # the noise level of pure noise
BASE_PIXELS = 512 * 512  # of the published system


@dataclass(frozen=True)
class RectifiedFlow:
    """Noise levels of one kind of training.

    Attributes:
        base_pixels: height times width at which a single picture keeps its noise levels.
        latent_frames: how the frames of a shape are counted. True: as the VAE's latent frames, F//4 + F%2
            (the published stages 2 and 3). False: 5 for each 17 (their stage 1, where clips have one frame).
    """

    base_pixels: int = BASE_PIXELS
    latent_frames: bool = True

    def shift(self, t: Tensor, shape: VideoShape) -> Tensor:
        """Moves noise levels up for larger videos: 1000 r s / (1 + (r - 1) s) with s = t/1000, in fp32.

        r = sqrt(height * width / base_pixels) * sqrt(n), n the counted frames (golden notes, section 5).

        Args:
            t: noise levels in [0, 1000], of any shape.
            shape: frames, height and width in pixels of the video.

        Returns:
            Noise levels in [0, 1000], shaped like ``t``, fp32.

        Raises:
            ValueError: the shape has no frames as counted (``latent_frames=False`` and 2 to 16 frames).
        """
        frames, height, width = shape
        # Rounded step by step in fp32: the published times bit for bit, where rounding once would differ by 1e-4.
        pixels = torch.tensor(float(height * width), device=t.device)
        counted = torch.tensor(float(self._counted(frames)), device=t.device)
        r = (pixels / self.base_pixels).sqrt() * counted.sqrt()
        s = t.float() / NOISE
        return r * s / (1 + (r - 1) * s) * NOISE

    def timesteps(self, steps: int, shape: VideoShape) -> Tensor:
        """Computes the falling noise levels of sampling, 1000 (1 - i/steps), shifted for the size of the video.

        Args:
            steps: number of steps.
            shape: frames, height and width in pixels of the video.

        Returns:
            (steps) noise levels in [0, 1000], fp32.

        Raises:
            ValueError: the shape has no frames as counted, see ``shift``.
        """
        return self.shift(torch.tensor([(1 - i / steps) * NOISE for i in range(steps)]), shape)

    def draw_timesteps(self, generator: torch.Generator | None, batch: int, shape: VideoShape) -> Tensor:
        """Draws noise levels of training on the CPU, logit-normal, then shifted.

        Args:
            generator: draws the random numbers; None: torch's own.
            batch: B.
            shape: frames, height and width in pixels of the videos.

        Returns:
            (B) noise levels in [0, 1000], fp32.

        Raises:
            ValueError: the shape has no frames as counted, see ``shift``.
        """
        return self.shift(NOISE * torch.randn(batch, generator=generator).sigmoid(), shape)

    @staticmethod
    def add_noise(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Computes x_t = (1 - t/1000) x_0 + (t/1000) noise, the point of the path at noise level t.

        Args:
            x_0: (B, ...) clean latents.
            noise: shaped like ``x_0``.
            t: (B) noise levels in [0, 1000].

        Returns:
            Noisy latents x_t, shaped like ``x_0``.
        """
        s = (t / NOISE).view(-1, *[1] * (x_0.ndim - 1))
        return (1 - s) * x_0 + s * noise

    @staticmethod
    def loss(prediction: Tensor, x_0: Tensor, noise: Tensor, x_mask: Tensor | None = None) -> Tensor:
        """Computes the mean squared error of the velocity over the noisy frames of each sample.

        Args:
            prediction: (B, ..., T, H, W) velocity.
            x_0: clean latents of the same shape.
            noise: noise of the same shape, the end of the path.
            x_mask: (B, T) bool, True = noisy; None: all noisy.

        Returns:
            (B), fp32; 0 for a sample without noisy frames.
        """
        error = (prediction.float() - (x_0 - noise)).square()
        by_frame = error.movedim(-3, 1).flatten(2).mean(dim=2)
        if x_mask is None:
            return by_frame.mean(dim=1)
        return (by_frame * x_mask).sum(dim=1) / x_mask.sum(dim=1).clamp(min=1)

    def _counted(self, frames: int) -> int:
        if frames == 1:
            return 1
        counted = frames // 4 + frames % 2 if self.latent_frames else frames // 17 * 5
        if counted == 0:
            raise ValueError(f"{frames} frames count as none; use latent_frames=True")
        return counted


def restore_conditioning_frames(x_t: Tensor, x_0: Tensor, x_mask: Tensor | None) -> Tensor:
    """Puts the clean ``x_0`` in place of ``x_t`` in the conditioning frames.

    Args:
        x_t: (B, ..., T, H, W) noisy latents.
        x_0: clean latents of the same shape.
        x_mask: (B, T) bool, False = conditioning frame; None: there is none.

    Returns:
        (B, ..., T, H, W).
    """
    return x_t if x_mask is None else torch.where(over_frames(x_mask, x_t), x_t, x_0)


def over_frames(x_mask: Tensor, x: Tensor) -> Tensor:
    """Reshapes a mask or number for each frame so that it broadcasts against latents.

    Args:
        x_mask: (B, T).
        x: (B, ..., T, H, W), read for its number of dimensions.

    Returns:
        (B, 1, ..., T, 1, 1).
    """
    return x_mask.view(len(x_mask), *[1] * (x.ndim - 4), -1, 1, 1)
