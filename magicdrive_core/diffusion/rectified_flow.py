"""Rectified flow: straight paths from data to noise, and the way back along a learned velocity. No network in here.

    x_t = (1 - t/1000) x_0 + (t/1000) noise        the path, t in [0, 1000]
    v   = x_0 - noise                              its velocity, what a network learns
    x  += v (t_i - t_{i+1}) / 1000                 an Euler step towards the data

Tensors are (B, ..., T, H, W): samples first, latent frames third from last. Liu et al., "Flow straight and fast"
(2022); the size-aware shift of t is that of Esser et al., "Scaling rectified flow transformers" (2024), with the
frame count of the golden notes, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x (B, ..., T, H, W), t (B), x_mask (B, T) bool or None) -> velocity like x."""

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

        r = sqrt(height * width / base_pixels) * sqrt(n), n the counted frames.

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
        """(steps) falling noise levels of sampling: 1 - i/steps, shifted."""
        return self.shift(torch.tensor([(1 - i / steps) * NOISE for i in range(steps)]), shape)

    def draw_timesteps(self, generator: torch.Generator | None, batch: int, shape: VideoShape) -> Tensor:
        """(batch) noise levels of training on the CPU: logit-normal, then shifted. None: torch's own generator."""
        return self.shift(NOISE * torch.randn(batch, generator=generator).sigmoid(), shape)

    @staticmethod
    def add_noise(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of the noise levels ``t`` (B)."""
        s = (t / NOISE).view(-1, *[1] * (x_0.ndim - 1))
        return (1 - s) * x_0 + s * noise

    @staticmethod
    def loss(prediction: Tensor, x_0: Tensor, noise: Tensor, x_mask: Tensor | None = None) -> Tensor:
        """(B) mean squared error of the velocity over the noisy frames of each sample; 0 where a sample has none."""
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


def keep_given(x_t: Tensor, x_0: Tensor, x_mask: Tensor | None) -> Tensor:
    """``x_t`` with the clean ``x_0`` in the frames where ``x_mask`` (B, T) is False."""
    return x_t if x_mask is None else torch.where(_over_frames(x_mask, x_t), x_t, x_0)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_null + scale (v_cond - v_null)."""
    return unconditional + scale * (conditional - unconditional)


def sample(
    velocity: Velocity,
    noise: Tensor,
    timesteps: Tensor,
    *,
    x_0: Tensor | None = None,
    edit: Tensor | None = None,
    draw_noise: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Integrates a velocity from noise to data.

    Args:
        velocity: called once a step with x, t (B) and the mask of noisy frames.
        noise: (B, ..., T, H, W), the start.
        timesteps: falling noise levels.
        x_0: given frames, like ``noise``; needed with ``edit``.
        edit: (B, T) in [0, 1]. 0: keep the frame of ``x_0``; 1: generate it; between: the noised frame of ``x_0`` is
            the start, once the noise level has fallen to 1000 times the value.
        draw_noise: noise like its argument for the last kind of frames, drawn at every step.
        progress: wraps the steps.

    Returns:
        x_0 of the same shape, in fp32.
    """
    x = noise.float()
    if edit is None:
        for i in progress(range(len(timesteps))):
            x = x + velocity(x, timesteps[i].expand(len(x)), None) * _step(timesteps, i)
        return x
    if x_0 is None:
        raise ValueError("edit needs the given frames x_0")
    generated = edit >= 1
    x = torch.where(_over_frames(generated, x), x, x_0)
    before = generated
    for i in progress(range(len(timesteps))):
        t = timesteps[i].expand(len(x))
        active = edit * NOISE >= t[:, None]
        x = torch.where(_over_frames(active & ~before, x), RectifiedFlow.add_noise(x_0, draw_noise(x), t), x)
        x = torch.where(_over_frames(active, x), x + velocity(x, t, active) * _step(timesteps, i), x_0)
        before = active | generated
    return x


def _step(timesteps: Tensor, i: int) -> Tensor:
    """Length of the i-th step; the last one ends at noise level 0."""
    end = timesteps[i + 1] if i + 1 < len(timesteps) else torch.zeros_like(timesteps[i])
    return (timesteps[i] - end) / NOISE


def _over_frames(x_mask: Tensor, x: Tensor) -> Tensor:
    """(B, T) -> (B, 1, ..., T, 1, 1), broadcastable against ``x``."""
    return x_mask.view(len(x_mask), *[1] * (x.ndim - 4), -1, 1, 1)
