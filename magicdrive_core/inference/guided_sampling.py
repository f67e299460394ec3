"""Sampling latents with the network under classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow, guide, sample
from magicdrive_core.diffusion.step_cache import StepCache
from magicdrive_core.parallel.concurrent_passes import ConcurrentPasses, in_turn
from magicdrive_core.parallel.parallelize import sequence_group_of

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Unconditional
    from magicdrive_core.diffusion.rectified_flow import Velocity
    from magicdrive_core.model.inputs import Conditions
    from magicdrive_core.model.transformer import MagicDrive
    from magicdrive_core.parallel.sequence_parallel import RankGroup


def guided_velocity(
    network: MagicDrive,
    conditions: Conditions,
    null: Conditions,
    latent_shape: tuple[int, int, int],
    guidance: float,
    *,
    guidance_group: RankGroup | None = None,
    step_cache: float | None = None,
) -> Velocity:
    """The velocity of guided sampling, with both conditions encoded once.

    ``guidance_group``: the first of two devices makes the conditional pass, the second the other one.
    ``step_cache``: see ``StepCache``; each pass has one.
    """

    def one_pass(told: Conditions) -> Velocity:
        context = network.encode(told, latent_shape)
        cache = None if step_cache is None else StepCache(step_cache)
        return lambda x, t, x_mask: network.denoise(x, t, context, x_mask, cache)

    if guidance == 1:
        return one_pass(conditions)
    if guidance_group is not None:
        own = one_pass((conditions, null)[guidance_group.rank])

        def both(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
            with_conditions, without = guidance_group.all_gather(own(x, t, x_mask))
            return guide(with_conditions, without, guidance)

        return both
    passes = one_pass(conditions), one_pass(null)
    call = ConcurrentPasses(2) if _at_once(network) else in_turn

    def guided(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        with_conditions, without = call(*(partial(one, x, t, x_mask) for one in passes))
        return guide(with_conditions, without, guidance)

    return guided


def _at_once(network: MagicDrive) -> bool:
    """Whether a CPU's threads can be halved. Devices that share a clip have to call each other in one order."""
    own_cpu = network.base_token.device.type == "cpu" and sequence_group_of(network) is None
    return own_cpu and torch.get_num_threads() % 2 == 0


def unconditional(
    network: MagicDrive, conditions: Conditions, kind: Unconditional | None = None, *, zero_map: bool = True
) -> Conditions:
    """The state that guidance leads away from: the dropped one of training, or the published samplers' own.

    Args:
        network: None of ``kind`` leaves the choice to its ``published``.
        conditions: what guidance leads to.
        kind: see ``generate.unconditional`` in params.yaml.
        zero_map: of "rflow": an empty map.
    """
    if (kind or ("rflow" if network.config.published else "consistent")) == "consistent":
        return conditions.dropped()
    return published_null(network, conditions, zero_map=zero_map or kind == "rflow-slice")


def published_null(network: MagicDrive, conditions: Conditions, *, zero_map: bool = True) -> Conditions:
    """The unconditional state of the published sampler, which is not the one of training (oddity 9).

    The null text cut like the prompt, cameras and ego motion unknown, all boxes absent instead of hidden, and, as its
    test configurations want, an empty map.
    """
    null_text = network.y_embedder.y_embedding[: conditions.text.shape[1]].to(conditions.text.dtype)
    ego_motion = conditions.ego_motion.clone()
    ego_motion[..., :3, :] = network.frame_embedder.uncond_cam
    return replace(
        conditions,
        text=null_text.expand_as(conditions.text),
        cameras=network.camera_embedder.uncond_cam.expand_as(conditions.cameras),
        ego_motion=ego_motion,
        box_masks=torch.zeros_like(conditions.box_masks),
        bev_map=torch.zeros_like(conditions.bev_map) if zero_map else conditions.bev_map,
    )


@torch.no_grad()
def sample_latents(
    network: MagicDrive,
    conditions: Conditions,
    latent_shape: tuple[int, int, int],
    *,
    steps: int,
    guidance: float,
    flow: RectifiedFlow,
    generator: torch.Generator | Sequence[torch.Generator],
    null: Conditions | None = None,
    x_0: Tensor | None = None,
    x_mask: Tensor | None = None,
    guidance_group: RankGroup | None = None,
    step_cache: float | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """Samples latents of ``conditions``, which are encoded once and used at every step.

    Args:
        network: in any dtype, on any device; the latents stay in fp32 between the steps.
        conditions: a batch of one size and length, on the network's device.
        latent_shape: (T, H, W).
        steps: number of Euler steps.
        guidance: v = v_null + guidance (v_cond - v_null); with 1 the unconditional pass is left out.
        flow: the noise levels that the network was trained on.
        generator: CPU generators of the start noise, one a sample, so that a sample does not depend on its batch;
            a single one draws for the samples in turn.
        null: the unconditional state; None: ``unconditional``.
        x_0: (B, V, C, T, H, W), given frames; needed with ``x_mask``.
        x_mask: (B, T), 1 or True = generate, 0 or False = keep the given frame; between 0 and 1: start from it,
            noised (``rectified_flow.sample``).
        guidance_group, step_cache: as of ``guided_velocity``.
        progress: wraps the steps.

    Returns:
        (B, V, C, T, H, W) in fp32.
    """
    batch, views, frames = conditions.cameras.shape[:3]
    device = conditions.cameras.device
    generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples")
    shape = (views, network.config.latent_channels, *latent_shape)

    def draw_noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=each) for each in generators]).to(device)

    start = draw_noise()
    if network.config.instance_latent and conditions.box_latent is None:
        latents = (conditions.box_classes.shape[-1], network.config.class_width or network.config.width)
        drawn = torch.stack([torch.randn(latents, generator=each) for each in generators])
        conditions = replace(conditions, box_latent=drawn.to(device))
    size = (frames, int(conditions.height[0]), int(conditions.width[0]))
    return sample(
        guided_velocity(
            network,
            conditions,
            null or unconditional(network, conditions),
            latent_shape,
            guidance,
            guidance_group=guidance_group,
            step_cache=step_cache,
        ),
        start,
        flow.timesteps(steps, size).to(device),
        x_0=x_0,
        edit=None if x_mask is None else x_mask.to(device, torch.float32),
        draw_noise=lambda _: draw_noise(),
        progress=progress or iter,
    )
