"""The published switch: oddities that it copies, each with the difference shown (docs/decisions/0003)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.inference.guided_sampling import sample_latents, unconditional
from magicdrive_core.model.blocks import MultiViewBlock
from magicdrive_core.model.context import ALL, BlockContext, ContextTokens
from magicdrive_core.model.embedders import PICTURE_WIDTH, CameraEmbedder
from magicdrive_core.model.published.transformer import (
    PublishedCameraEmbedder,
    PublishedMultiViewBlock,
    published_null,
)
from tests.model.networks import conditions, config, network

SHAPE = (3, 4, 6)


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True])
def test_cross_view_modulation_by_vectors_or_by_three_scalars(published: bool) -> None:
    """Oddity 1: published, all but three numbers of the time projection leave cross-view attention as it is."""
    torch.manual_seed(0)
    block = (PublishedMultiViewBlock if published else MultiViewBlock)(config())
    tokens = torch.randn(1, 6, 2, 5, 32)
    nothing = ContextTokens(torch.empty(1, 0, 32), 6, 0, 0, 0, None)
    context = BlockContext(nothing, None, None, torch.zeros(2, 8, 2), 5, ALL, ALL)
    time = torch.randn(1, 1, 6, 32)
    other = torch.randn(1, 1, 6, 32)
    other[:, :, 0, :3] = time[:, :, 0, :3]
    torch.nn.init.normal_(block.mva_proj.weight)
    first, second = (block.across_views(tokens, by, context) for by in (time, other))
    assert torch.equal(first, second) == published


@torch.no_grad()
def test_intrinsics_in_units_of_the_picture_or_in_pixels() -> None:
    """Oddity 3: pixels of about 1e3 go through sines as they are; by default the width of the picture is 1."""
    torch.manual_seed(0)
    pixels, unit = PublishedCameraEmbedder(32), CameraEmbedder(32)
    torch.nn.init.normal_(pixels.emb2token.weight)
    unit.load_state_dict(pixels.state_dict())
    cameras, keep = torch.randn(4, 3, 7), torch.ones(4, dtype=torch.bool)
    cameras[:, :2, :3] *= PICTURE_WIDTH
    small = cameras.clone()
    small[:, :2, :3] /= PICTURE_WIDTH
    torch.testing.assert_close(unit(cameras, keep), pixels(small, keep))
    assert not torch.allclose(unit(cameras, keep), pixels(cameras, keep), atol=0.1)


@pytest.mark.parametrize("published", [False, True])
def test_guidance_leads_away_from_the_state_of_training_or_the_published_sampler_s(published: bool) -> None:
    """Oddity 9: the two states give different samples; each network takes its own."""
    net, cond = network(published=published), conditions()
    for state in ("null", "mask"):  # both start at zero
        torch.nn.init.normal_(getattr(net.bbox_embedder, f"{state}_class_feature"))
    states = {"training": cond.dropped(), "published": published_null(net, cond)}
    samples = {
        name: sample_latents(
            net,
            cond,
            SHAPE,
            flow=RectifiedFlow(),
            steps=2,
            guidance=2.0,
            generator=torch.Generator().manual_seed(1),
            null=null,
        )
        for name, null in (states | {"own": None}).items()
    }
    assert torch.equal(samples["own"], samples["published" if published else "training"])
    assert (samples["training"] - samples["published"]).abs().max() > 1e-3


@torch.no_grad()
def test_the_dropped_state_is_what_training_sees() -> None:
    """The same velocities as a training sample whose conditions are dropped by ``keep``, in one batch with others."""
    net, two = network(), conditions(batch=2)
    dropped = replace(two, keep=torch.tensor([False, True]))
    x, t = torch.randn(2, 6, 3, *SHAPE), torch.tensor([500.0, 500.0])
    alone = unconditional(net, two.map(lambda tensor: tensor[:1]))
    torch.testing.assert_close(net(x, t, dropped)[:1], net(x[:1], t[:1], alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_positions_are_rounded_once_under_bf16() -> None:
    """Oddity 5: computed in fp32 and rounded at the end, where bf16 frequencies would be off by hundredths."""
    cond = replace(conditions(), height=torch.tensor([848.0]), width=torch.tensor([1600.0]))
    exact, low = (net.encode(cond, (3, 106, 200)).position for net in (network(), network().bfloat16()))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, exact.bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True])
def test_conditioning_frames_are_normalised_once_or_twice_by_the_head(published: bool) -> None:
    """Oddity 13: conditioning frames are at noise level zero by default; published, the head sees both levels."""
    net, cond, x = network(published=published), conditions(), torch.randn(1, 6, 3, *SHAPE)
    clean = net(x, torch.tensor([700.0]), cond, torch.zeros(1, 3, dtype=torch.bool))
    at_zero = net(x, torch.zeros(1), cond)
    assert torch.allclose(clean, at_zero, atol=1e-5) != published


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True])
def test_fresh_convolutions_keep_the_map_s_scale_or_lose_it(published: bool) -> None:
    """The published ones make nearly the same of any two maps; by default two maps differ as much as other tokens."""
    net = network(fresh=True, published=published, map_channels=(16, 32, 96, 256))
    maps = (torch.rand(2, 1, 8, 25, 25) < 0.2).float().repeat_interleave(4, -1).repeat_interleave(4, -2)
    features = net.controlnet_cond_embedder_temp(net.controlnet_cond_embedder(maps[:, 0])[:, None])
    difference = (features[0] - features[1]).std()
    assert (difference > 0.1) != published
    assert (difference < 0.003) == published
