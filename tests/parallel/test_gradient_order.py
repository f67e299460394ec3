"""Gradients enter the reductions in the order in which the backward pass produces them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import blank_conditions
from magicdrive_core.model.published.checkpoint import PUBLISHED_XL
from magicdrive_core.parallel.gradient_order import arrival_order
from magicdrive_core.parallel.parallelize import parallelize
from tests.model.networks import config

MOST_WAITING = 0.1  # of all elements of gradients


def waiting(sizes: NetworkConfig, frames: int, *, masked: bool, order: list[str] | None = None) -> float:
    """Return the largest share of gradient elements that wait for others before them, in a pass over one clip.

    Activations are computed again in the backward pass, as in stages 2 and 3.
    """
    meta = torch.device("meta")
    with meta:
        network = build_network(sizes).to(meta)
    network.y_embedder.requires_grad_(False)  # as these stages freeze it
    order = order or arrival_order(network)
    parallelize(network, recompute_every=1)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert sorted(order) == sorted(trained)
    position = {name: index for index, name in enumerate(order)}
    arrived, next_one, elements, most = [False] * len(order), 0, 0, 0

    def note(name: str) -> None:
        nonlocal next_one, elements, most
        arrived[position[name]] = True
        elements += trained[name].numel()
        while next_one < len(order) and arrived[next_one]:
            elements -= trained[order[next_one]].numel()
            next_one += 1
        most = max(most, elements)

    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name))
    latents = (frames - 1) // 4 + 1
    x = torch.zeros(1, 6, sizes.latent_channels, latents, 4, 4, device=meta)
    x_mask = torch.ones(1, latents, dtype=torch.bool, device=meta) if masked else None
    network(x, torch.zeros(1, device=meta), blank_conditions(sizes, frames, device=meta), x_mask).sum().backward()
    assert next_one == len(order)  # every parameter is used, by clips of every length
    return most / sum(parameter.numel() for parameter in trained.values())


@pytest.mark.parametrize(("published", "frames", "masked"), [(False, 1, False), (False, 33, True), (True, 1, True)])
def test_few_gradients_wait_whatever_the_clip(published: bool, frames: int, masked: bool) -> None:
    assert waiting(config(published=published, depth=4, control_depth=2), frames, masked=masked) < MOST_WAITING


def test_first_stage_networks_have_an_order_too() -> None:
    sizes = config(temporal=False, instance_latent=False, mean_over_frames=True, depth=4, control_depth=2)
    assert waiting(sizes, 1, masked=False) < MOST_WAITING


def test_at_most_a_tenth_of_the_gradients_of_the_xl_network_wait() -> None:
    """In the order of its parameters, 86 % of all elements would: 3.5 GB on each rank, reduced at the very end."""
    assert waiting(replace(PUBLISHED_XL, published=False), 17, masked=True) < MOST_WAITING


def test_the_order_of_the_parameters_is_no_order_of_arrival() -> None:
    sizes = config(depth=4, control_depth=2)
    with torch.device("meta"):
        network = build_network(sizes)
    network.y_embedder.requires_grad_(False)
    order = [name for name, parameter in network.named_parameters() if parameter.requires_grad][::-1]
    assert waiting(sizes, 17, masked=True, order=order) > 4 * MOST_WAITING
