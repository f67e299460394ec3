"""Solvers: from noise to data along a learned velocity.

    x_{i+1} = x_i + v(x_i, t_i) (t_i - t_{i+1}) / 1000        Euler's method, towards the data; the last t is 0

A solver knows neither network nor conditions: only a function that gives velocities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from magicdrive_core.diffusion.rectified_flow import NOISE, RectifiedFlow, over_frames

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (B, ..., T, H, W), t (B), x_mask (B, T) bool or None) -> velocity like x."""


class EulerSolver:
    """Euler's method on given noise levels.

    Args:
        timesteps: falling noise levels in [0, 1000], one for each step.
    """

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps

    def sample(
        self,
        velocity: Velocity,
        noise: Tensor,
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
            x_0: conditioning frames, like ``noise``; needed with ``edit``.
            edit: (B, T) in [0, 1]. 0: keep the frame of ``x_0``; 1: generate it; between: the noised frame of ``x_0``
                is the start, once the noise level has fallen to 1000 times the value.
            draw_noise: noise like its argument for the last kind of frames, drawn at every step.
            progress: wraps the steps.

        Returns:
            x_0 like ``noise``, in fp32.

        Raises:
            ValueError: ``edit`` without ``x_0``.
        """
        x = noise.float()
        if edit is None:
            for i in progress(range(len(self.timesteps))):
                x = x + velocity(x, self.timesteps[i].expand(len(x)), None) * self._step(i)
            return x
        if x_0 is None:
            raise ValueError("edit needs the conditioning frames x_0")
        generated = edit >= 1
        x = torch.where(over_frames(generated, x), x, x_0)
        before = generated
        for i in progress(range(len(self.timesteps))):
            t = self.timesteps[i].expand(len(x))
            active = edit * NOISE >= t[:, None]
            x = torch.where(over_frames(active & ~before, x), RectifiedFlow.add_noise(x_0, draw_noise(x), t), x)
            x = torch.where(over_frames(active, x), x + velocity(x, t, active) * self._step(i), x_0)
            before = active | generated
        return x

    def _step(self, i: int) -> Tensor:
        """Length of the i-th step; the last one ends at noise level 0."""
        start = self.timesteps[i]
        end = self.timesteps[i + 1] if i + 1 < len(self.timesteps) else torch.zeros_like(start)
        return (start - end) / NOISE
