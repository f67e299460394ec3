"""What a checkpointed block keeps, and when its gradients arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from magicdrive_core.parallel.parallelize import parallelize
from tests.model.networks import conditions, network, noisy

SLOTS = 5
CONTEXT_LENGTH = 2 + 7 + SLOTS


def kept_keys_and_values(recompute_every: int) -> int:
    """Tensors shaped like keys and values of a whole context that a forward pass keeps for the backward pass."""
    net = network()
    parallelize(net, recompute_every=recompute_every)
    shapes: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(noisy(), torch.tensor([700.0]), conditions(slots=SLOTS))
    return sum(CONTEXT_LENGTH in shape for shape in shapes)


def test_a_checkpointed_block_keeps_no_keys_and_values_of_the_context() -> None:
    assert kept_keys_and_values(recompute_every=0) > 0
    assert kept_keys_and_values(recompute_every=1) == 0


def test_gradients_of_keys_and_values_arrive_with_their_block() -> None:
    net, arrived = network(), []
    for index, block in enumerate(net.blocks()):
        block.cross_attn.kv_linear.weight.register_hook(lambda _, index=index: arrived.append(index))
        block.attn.qkv.weight.register_hook(lambda _, index=index: arrived.append(index))
    net(noisy(), torch.tensor([700.0]), conditions()).square().mean().backward()
    last, first = max(arrived), min(arrived)
    assert arrived.index(last) < arrived.index(first)
    assert max(i for i, index in enumerate(arrived) if index == last) < min(
        i for i, index in enumerate(arrived) if index == first
    )
