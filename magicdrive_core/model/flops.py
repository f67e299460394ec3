"""How many floating point operations a training step needs, from the network's sizes alone.

Counted are twice the multiply-adds of linear maps and of attention, and for a backward pass twice those of the forward
pass. Norms, activations, the map's convolutions and the embedders of cameras, text and time are left out (below 1 % at
XL); so is what activation checkpointing computes again, as is usual for "model FLOPs".
"""

from __future__ import annotations

from collections.abc import Sequence

from magicdrive_core.model.config import PATCH, NetworkConfig
from magicdrive_core.model.rays import ray_features

FORWARD_AND_BACKWARD = 3


def training_flops(config: NetworkConfig, batch: int, frames: int, latents: Sequence[int], slots: int) -> float:
    """Counts the operations of a micro-batch's forward and backward pass.

    Args:
        config: the network.
        batch: B samples.
        frames: F of the video.
        latents: T, H, W of the latents.
        slots: N boxes of a clip.

    Returns:
        Floating point operations, two for each multiply-add.
    """
    width, views, t = config.width, len(config.neighbours), latents[0]
    frame_tokens = -(-latents[1] // PATCH) * -(-latents[2] // PATCH)
    tokens = views * batch * t * frame_tokens
    context_frames = 1 if config.mean_over_frames else t
    context = 2 + config.text_tokens + slots
    rows = batch * (context_frames + views + config.text_tokens + views * context_frames * slots)
    others = len(config.neighbours[0])

    # Multiply-adds of a token and block: linear maps in units of C^2, attended keys in units of 2 C.
    block = 4 + 2 + 2 * config.mlp_ratio  # q k v and projection; q and projection to the context; MLP
    across_views = 4 + 1
    spatial, temporal = (block, frame_tokens + context), (block, t + context)
    control = config.control_depth
    kinds = [
        (config.depth, spatial[0] + across_views, spatial[1] + others * frame_tokens),
        (control, block + 1, spatial[1]),
    ]
    if config.temporal:
        kinds += [(config.depth, *temporal), (control * config.control_temporal, block + 1, temporal[1])]
    blocks = sum(count * tokens * (linear * width**2 + 2 * keys * width) for count, linear, keys in kinds)
    keys_values = sum(count for count, _, _ in kinds) * rows * 2 * width**2

    patch = PATCH**2 * config.latent_channels * width  # into the main and the control branch, and out of the head
    map_tokens = batch * t * frame_tokens * (PATCH**2 + 1) * width**2
    boxes = views * batch * frames * slots * (4 + 2 * config.mlp_ratio + 1) * width**2
    rays = tokens * (config.rays**2 * ray_features(config) * width + width**2) if config.rays else 0
    return FORWARD_AND_BACKWARD * 2.0 * (blocks + keys_values + 3 * tokens * patch + map_tokens + boxes + rays)
