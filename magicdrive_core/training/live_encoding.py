"""Devices that share clips encode them together (latents.live): each its part of the views, and then all have all."""

from __future__ import annotations

import torch
from torch import Tensor

from magicdrive_core.data.records import Clip
from magicdrive_core.device import this_device
from magicdrive_core.encoders.caches import LiveLatents
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.parallel.sequence_parallel import RankGroup


class SharedEncoding:
    """Encoding needs no other device, so that a thread may do it ahead; handing out does, and is for all at once.

    Args:
        latents: of this device.
        group: ranks with micro-batches and random numbers that are the same on all of them.
    """

    def __init__(self, latents: LiveLatents, group: RankGroup) -> None:
        self._latents, self._group = latents, group

    def moments(self, size: str, clips: list[Clip]) -> Tensor:
        """(B, V, 2C, T, h, w): posterior mean and log-variance; zeros for views that other devices encode."""
        own = self._own(len(clips) * len(VIEWS))
        moments = []
        for index, clip in enumerate(clips):
            views = [video % len(VIEWS) for video in own if video // len(VIEWS) == index]
            moments.append(self._latents.moments(size, clip, views))
        return torch.stack(moments)

    def hand_out(self, latents: Tensor) -> Tensor:
        """(B, V, C, T, h, w), of which this device's part counts -> all parts, on the device. Collective."""
        videos = latents.flatten(0, 1)
        own = self._own(len(videos))
        part = torch.zeros(self._most(len(videos)), *videos.shape[1:], device=this_device())
        part[: len(own)] = videos[own.start : own.stop]
        return self._group.all_gather(part).flatten(0, 1)[: len(videos)].view(latents.shape)

    def _most(self, videos: int) -> int:
        return -(-videos // self._group.size)

    def _own(self, videos: int) -> range:
        """Of all clips' views one after the other; the last devices may have fewer, or none."""
        most = self._most(videos)
        return range(videos)[self._group.rank * most : (self._group.rank + 1) * most]
