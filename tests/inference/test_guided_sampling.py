"""Sampling with the network: what a sample depends on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.inference.guided_sampling import sample_latents, unconditional
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.parallel.sequence_parallel import RankGroup
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
    net, cond = network(), conditions()
    calls = []
    net.final_layer.register_forward_hook(lambda *_: calls.append(1))
    plain = sample_latents(net, cond, SHAPE, steps=2, guidance=1.0, flow=FLOW, generator=generators(1)[0])
    assert len(calls) == 2
    close = sample_latents(net, cond, SHAPE, steps=2, guidance=1.0 + 1e-7, flow=FLOW, generator=generators(1)[0])
    assert len(calls) == 6
    torch.testing.assert_close(plain, close, rtol=1e-4, atol=1e-4)


class SharedByTwo(RankGroup):
    """As if another device had its part in each call."""

    size, rank = 2, 0

    def __init__(self) -> None: ...

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_make_both_passes_at_once_with_an_equal_result(two_threads: None) -> None:
    net, cond = network(), conditions()
    settings = {"steps": 2, "guidance": 2.0, "flow": FLOW}
    meeting = threading.Barrier(2, timeout=60)  # one pass waits in it for the other

    def wait(*_: object) -> None:
        meeting.wait()

    hook = net.final_layer.register_forward_hook(wait)
    together = sample_latents(net, cond, SHAPE, generator=generators(1)[0], **settings)
    hook.remove()
    torch.set_num_threads(1)
    assert torch.equal(sample_latents(net, cond, SHAPE, generator=generators(1)[0], **settings), together)


def test_devices_that_share_a_clip_make_the_passes_in_turn(two_threads: None) -> None:
    net, cond = network(), conditions()
    threads: set[int] = set()
    net.final_layer.register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    parallelize(net, sequence_group=SharedByTwo())
    sample_latents(net, cond, SHAPE, steps=2, guidance=2.0, flow=FLOW, generator=generators(1)[0])
    assert threads == {threading.get_ident()}


def test_conditioning_frames_are_kept() -> None:
    net, cond = network(), conditions()
    x_0 = torch.randn(1, 6, 3, *SHAPE)
    mask = torch.tensor([[False, True, True]])
    settings = {"steps": 2, "guidance": 2.0, "flow": FLOW, "x_0": x_0, "x_mask": mask}
    out = sample_latents(net, cond, SHAPE, generator=generators(1)[0], **settings)
    assert torch.equal(out[:, :, :, 0], x_0[:, :, :, 0])
    assert not torch.allclose(out[:, :, :, 1], x_0[:, :, :, 1])


def test_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="2 generators for 1 samples"):
        sample_latents(network(), conditions(), SHAPE, steps=1, guidance=2.0, flow=FLOW, generator=generators(1, 2))


def test_the_state_that_guidance_leads_away_from_can_be_chosen() -> None:
    cond = conditions()
    for published in (False, True):
        net = network(published=published)
        consistent = unconditional(net, cond, "consistent")
        assert not consistent.keep.any()
        assert torch.equal(consistent.bev_map, cond.bev_map)
        for kind, zero_map, empty in (
            ("rflow", True, True),
            ("rflow", False, False),
            ("rflow-slice", False, True),
        ):
            chosen = unconditional(net, cond, kind, zero_map=zero_map)
            assert chosen.keep.all()
            assert not chosen.box_masks.any()
            assert torch.equal(chosen.bev_map, cond.bev_map * (not empty))
        default = unconditional(net, cond)
        assert bool(default.keep.all()) == published


def test_the_chosen_state_decides_the_sample() -> None:
    net, cond = network(), conditions()
    settings = {"steps": 2, "guidance": 2.0, "flow": FLOW}
    samples = [
        sample_latents(
            net, cond, SHAPE, generator=generators(1)[0], null=unconditional(net, cond, kind, zero_map=zero), **settings
        )
        for kind, zero in (("consistent", True), ("rflow", False), ("rflow", True), ("rflow-slice", False))
    ]
    assert torch.equal(samples[2], samples[3])
    assert not torch.allclose(samples[0], samples[1])
    assert not torch.allclose(samples[1], samples[2])


def test_a_step_cache_passes_the_blocks_where_the_noise_level_has_fallen_enough() -> None:
    net, cond = network(), conditions()
    passed: list[int] = []
    net.base_blocks_s[0].mlp.register_forward_hook(lambda *_: passed.append(1))

    def run(step_cache: float | None, guidance: float = 1.0) -> tuple[torch.Tensor, int]:
        passed.clear()
        settings = {"steps": 6, "guidance": guidance, "flow": FLOW, "step_cache": step_cache}
        return sample_latents(net, cond, SHAPE, generator=generators(1)[0], **settings), len(passed)

    exact, every = run(None)
    levels = FLOW.timesteps(6, (9, 48, 80)).tolist()
    assert every == 6
    same, count = run(0.001)
    assert count == 6
    assert torch.equal(same, exact)
    within = 1.5 * (levels[0] - levels[1])
    near, count = run(within)
    kept, last = 0, float("inf")
    for level in levels:
        if last - level > within:
            kept, last = kept + 1, level
    assert count == kept < 6
    assert not torch.equal(near, exact)
    assert torch.equal(run(within)[0], near)
    assert run(within, guidance=2.0)[1] == 2 * kept
