"""Sampling with the network: what a sample depends on."""

from __future__ import annotations

import pytest
import torch

from magicdrive_core.model.guidance import sample_latents
from magicdrive_core.rectified_flow import RectifiedFlow
from tests.model.networks import conditions, network

SHAPE = (3, 4, 6)
FLOW = RectifiedFlow()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_sample_depends_on_its_own_generator_only() -> None:
    net, two = network(), conditions(batch=2)
    one = two.map(lambda tensor: tensor[1:])
    settings = {"steps": 2, "guidance": 2.0, "flow": FLOW}
    both = sample_latents(net, two, SHAPE, generator=generators(1, 2), **settings)
    alone = sample_latents(net, one, SHAPE, generator=generators(2)[0], **settings)
    assert both.shape == (2, 6, 3, *SHAPE)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    other = sample_latents(net, one, SHAPE, generator=generators(3)[0], **settings)
    assert not torch.allclose(alone, other)


def test_guidance_of_one_is_the_conditional_pass_alone() -> None:
    net, told = network(), conditions()
    calls = []
    net.final_layer.register_forward_hook(lambda *_: calls.append(1))
    plain = sample_latents(net, told, SHAPE, steps=2, guidance=1.0, flow=FLOW, generator=generators(1)[0])
    assert len(calls) == 2
    close = sample_latents(net, told, SHAPE, steps=2, guidance=1.0 + 1e-7, flow=FLOW, generator=generators(1)[0])
    assert len(calls) == 6
    torch.testing.assert_close(plain, close, rtol=1e-4, atol=1e-4)


def test_given_frames_are_kept() -> None:
    net, told = network(), conditions()
    given = torch.randn(1, 6, 3, *SHAPE)
    mask = torch.tensor([[False, True, True]])
    settings = {"steps": 2, "guidance": 2.0, "flow": FLOW, "x_0": given, "x_mask": mask}
    out = sample_latents(net, told, SHAPE, generator=generators(1)[0], **settings)
    assert torch.equal(out[:, :, :, 0], given[:, :, :, 0])
    assert not torch.allclose(out[:, :, :, 1], given[:, :, :, 1])


def test_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="2 generators for 1 samples"):
        sample_latents(network(), conditions(), SHAPE, steps=1, guidance=2.0, flow=FLOW, generator=generators(1, 2))
