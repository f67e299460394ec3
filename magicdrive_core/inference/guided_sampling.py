"""Sampling latents with the network under classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from magicdrive_core.diffusion.guidance import guide
from magicdrive_core.diffusion.solvers import EulerSolver, Velocity
from magicdrive_core.diffusion.step_cache import StepCache
from magicdrive_core.model.published.transformer import published_null
from magicdrive_core.parallel.concurrent_passes import ConcurrentPasses, one_after_another
from magicdrive_core.parallel.parallelize import sequence_group_of

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Unconditional
    from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
    from magicdrive_core.model.inputs import Conditions
    from magicdrive_core.model.transformer import MagicDrive
    from magicdrive_core.parallel.sequence_parallel import RankGroup


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
        guidance: scale in v = v_null + guidance (v_cond - v_null) (Ho and Salimans 2022); with 1 the unconditional pass
            is left out.
        flow: the noise levels that the network was trained on.
        generator: CPU generators of the start noise, one per sample, so that a sample does not depend on its batch;
            a single one draws for the samples in turn.
        null: the unconditional state; None: ``unconditional``.
        x_0: (B, V, C, T, H, W), conditioning frames; needed with ``x_mask``. None: no conditioning frames.
        x_mask: (B, T), 1 or True = generate, 0 or False = keep the conditioning frame; between 0 and 1: start from
            it, noised (``EulerSolver.sample``). None: all frames are generated.
        guidance_group: two ranks, one for each pass of guidance, see ``guided_velocity``; None: this rank makes both.
        step_cache: distance of noise levels (of 1000) within which a pass reuses what its blocks added, see
            ``StepCache``; None: no cache.
        progress: wraps the numbers of the steps; None: shows nothing.

    Returns:
        (B, V, C, T, H, W) in fp32, on the device of the conditions.

    Raises:
        ValueError: there are more or fewer generators than samples, or ``x_mask`` comes without ``x_0``.
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
    velocity = guided_velocity(
        network,
        conditions,
        null or unconditional(network, conditions),
        latent_shape,
        guidance,
        guidance_group=guidance_group,
        step_cache=step_cache,
    )
    return EulerSolver(flow.timesteps(steps, size).to(device)).sample(
        velocity,
        start,
        x_0=x_0,
        edit=None if x_mask is None else x_mask.to(device, torch.float32),
        draw_noise=lambda _: draw_noise(),
        progress=progress or iter,
    )


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
    """Builds the velocity of guided sampling, with both states encoded once.

    Args:
        network: computes one pass for each state.
        conditions: those that guidance leads to.
        null: the unconditional state.
        latent_shape: (T, H, W).
        guidance: scale in v = v_null + guidance (v_cond - v_null) (Ho and Salimans 2022); with 1 the unconditional pass
            is left out.
        guidance_group: two ranks, of which the first makes the conditional pass and the second the other one; None:
            this rank makes both.
        step_cache: ``StepCache``'s ``within``, a cache for each pass; None: no cache.

    Returns:
        A function of x (B, V, C, T, H, W), the noise level t (B) in [0, 1000] and the mask of noisy frames (B, T), or
        None where all are noisy, to the velocity, of the shape of x. With a cache it is for one sampling only.
    """
    one_pass = partial(pass_velocity, network, latent_shape, step_cache)
    if guidance == 1:
        return one_pass(conditions)
    if guidance_group is not None:
        own = one_pass((conditions, null)[guidance_group.rank])

        def of_both_ranks(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
            conditional, unconditional = guidance_group.all_gather(own(x, t, x_mask))
            return guide(conditional, unconditional, guidance)

        return of_both_ranks
    run = ConcurrentPasses(2) if _threads_can_be_shared(network) else one_after_another
    passes = run(partial(one_pass, conditions), partial(one_pass, null))  # encoded on a pass's own threads too

    def of_both_passes(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        conditional, unconditional = run(*(partial(each, x, t, x_mask) for each in passes))
        return guide(conditional, unconditional, guidance)

    return of_both_passes


def pass_velocity(
    network: MagicDrive, latent_shape: tuple[int, int, int], step_cache: float | None, conditions: Conditions
) -> Velocity:
    """Builds the velocity of one pass, whose conditions are encoded once.

    Args:
        network: computes the pass.
        latent_shape: (T, H, W).
        step_cache: ``StepCache``'s ``within``; None: no cache.
        conditions: what the pass is conditioned on, the unconditional state included.

    Returns:
        A function like that of ``guided_velocity``.
    """
    context = network.encode(conditions, latent_shape)
    cache = None if step_cache is None else StepCache(step_cache)

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        trunk = None if cache is None else partial(cache, network.trunk, float(t[0]))
        return network.denoise(x, t, context, x_mask, trunk)

    return velocity


def unconditional(
    network: MagicDrive, conditions: Conditions, kind: Unconditional | None = None, *, zero_map: bool = True
) -> Conditions:
    """Makes the state that guidance leads away from: the dropped one of training, or the published samplers' own.

    Args:
        network: whose ``unconditional`` decides where ``kind`` is None.
        conditions: those that guidance leads to.
        kind: "consistent": the dropped state of training; "rflow", "rflow-slice": those of the published samplers
            (decision record 0003, number 9); None: the network's.
        zero_map: whether the map of "rflow" is empty; that of "rflow-slice" always is.

    Returns:
        Conditions of the same shapes.
    """
    if (kind or network.unconditional) == "consistent":
        return conditions.dropped()
    return published_null(network, conditions, zero_map=zero_map or kind == "rflow-slice")


def _threads_can_be_shared(network: MagicDrive) -> bool:
    """Whether the two passes can have half of a CPU's threads each.

    Ranks that share a clip have to make their collectives in one order, and so their passes.
    """
    own_cpu = network.base_token.device.type == "cpu" and sequence_group_of(network) is None
    return own_cpu and torch.get_num_threads() % 2 == 0
