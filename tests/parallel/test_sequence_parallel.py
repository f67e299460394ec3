"""Sequence parallelism gives the result of one device: on threads for what it computes, on gloo ranks for gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.inference.guided_sampling import sample_latents
from magicdrive_core.model.inputs import Conditions
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.parallel.sequence_parallel import RankGroup
from tests.model.networks import conditions, network, noisy
from tests.parallel.devices import on_devices
from tests.training.gloo_ranks import join_gloo, run_distributed

SIZES: dict[str, Any] = {"heads": 8, "depth": 1}
X_MASK = torch.tensor([[False, True, True], [True, True, True]])


def cond(batch: int = 1) -> Conditions:
    return conditions(batch=batch)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("limit", [0, 150])
def test_any_number_of_devices_gives_one_picture(devices: int, limit: int) -> None:
    """3 x 5 tokens, which no number divides; in slices, and with keys and values computed by the blocks."""
    net = network(**SIZES)
    parallelize(net, slice_tokens=limit)
    x, t = noisy(batch=2, size=(6, 10)), torch.tensor([700.0, 300.0])

    def work(net: MagicDrive) -> Tensor:
        context = net.encode(cond(2), (3, 6, 10))
        context = context if limit == 0 else replace(context, kv={})
        return net.denoise(x, t, context, X_MASK)

    with torch.no_grad():
        whole = work(net)
    for out in on_devices(net, devices, work, slice_tokens=limit):
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(devices=st.integers(2, 5), heads=st.sampled_from([1, 2]), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_any_size_can_be_shared_out(devices: int, heads: int, size: tuple[int, int]) -> None:
    """More ranks than tokens too: some then hold nothing but padding."""
    net = network(width=8 * devices * heads, heads=devices * heads, ego_heads=1, box_heads=1, depth=1)
    asked = replace(cond(), box_latent=torch.randn(1, 3, net.config.width))
    x, t = noisy(size=size), torch.tensor([700.0])
    with torch.no_grad():
        whole = net(x, t, asked)
    for out in on_devices(net, devices, lambda net: net(x, t, asked)):
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("devices", "padding"), [(2, None), (4, None), (4, 8), (8, 4)])
def test_published_padding_depends_on_the_devices_unless_it_is_chosen(devices: int, padding: int | None) -> None:
    """Oddity 8: without a choice other devices give another picture; one device with their padding gives theirs."""
    net = network(published=True, **SIZES)
    x, t = noisy(size=(6, 10)), torch.tensor([700.0])
    with torch.no_grad():
        plain, padded = net(x, t, cond()), net(x, t, replace(cond(), pad_patches=padding or devices))
    assert (plain - padded).abs().max() > 1e-2
    for out in on_devices(net, devices, lambda net: net(x, t, replace(cond(), pad_patches=padding))):
        torch.testing.assert_close(out, padded, rtol=1e-5, atol=1e-5)


def test_sampling_is_one_too() -> None:
    net = network(**SIZES)

    def work(net: MagicDrive) -> Tensor:
        draw = torch.Generator().manual_seed(3)
        return sample_latents(net, cond(), (3, 6, 10), steps=2, guidance=2.0, flow=RectifiedFlow(), generator=draw)

    outs = on_devices(net, 4, work)
    torch.testing.assert_close(outs[0], work(net), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(out, outs[0]) for out in outs)


CASES: dict[str, tuple[int, dict[str, Any]]] = {  # devices that share a clip, out of four; of the network
    "two groups of two": (2, {}),
    "four": (4, {}),
    "four, recomputed": (4, {"recompute": True}),
    "four, padded as published for eight": (4, {"published": True, "pad_patches": 8}),
    "four, padded as published": (4, {"published": True}),
}


def loss_of(net: MagicDrive, clip: int, padding: int | None = None) -> Tensor:
    asked = replace(conditions(seed=clip), keep=torch.tensor([clip == 0]), pad_patches=padding)
    out = net(noisy(size=(6, 10), seed=clip), torch.tensor([400.0]), asked, X_MASK[:1])
    return (out - noisy(size=(6, 10), seed=7)).square().mean()


def made(changes: dict[str, Any]) -> MagicDrive:
    return network(**SIZES, **{name: value for name, value in changes.items() if name != "recompute"})


def all_cases() -> dict[str, tuple[float, dict[str, Tensor]]]:
    """On a rank: its loss, and the gradients averaged over all ranks."""
    results = {}
    for name, (share, changes) in CASES.items():
        group, _ = dist.new_subgroups(share)
        net = made(changes)
        parallelize(net, sequence_group=RankGroup(group), recompute_every=int("recompute" in changes))
        loss = loss_of(net, clip=dist.get_rank() // share)
        loss.backward()
        gradients = {}
        for parameter_name, parameter in net.named_parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient)
                gradients[parameter_name] = gradient / dist.get_world_size()
        results[name] = loss.item(), gradients if dist.get_rank() == 0 else {}
    return results


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, tuple[float, dict[str, Tensor]]]]:
    return run_distributed(all_cases, 4, join=join_gloo)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_device(
    case: str, on_ranks: list[dict[str, tuple[float, dict[str, Tensor]]]]
) -> None:
    """On gloo ranks, averaged over all of them as ZeRO does; a missing gradient is one that is zero everywhere."""
    share, changes = CASES[case]
    net = made(changes)
    losses = [loss_of(net, clip, changes.get("pad_patches", share)) for clip in range(4 // share)]
    torch.stack(losses).mean().backward()
    for rank, results in enumerate(on_ranks):
        assert results[case][0] == pytest.approx(losses[rank // share].item(), rel=1e-5)
    gradients = on_ranks[0][case][1]
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name)
