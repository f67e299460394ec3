"""ZeRO's shards of the parameters, by name: every rank holds 1/ranks of each fp32 tensor, flat and padded.

Master weights, Adam's moments and the EMA are cut alike, so that one pair of functions moves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from magicdrive_core.training.strategy import Boosted

MOMENTS = ("exp_avg", "exp_avg_sq")


def masters(boosted: Boosted) -> dict[str, Tensor]:
    """This rank's shards of the fp32 master weights: trainable parameters only, in the order of the network."""
    to_master = boosted.optimizer.get_working_to_master_map()
    return {name: to_master[id(p)] for name, p in boosted.network.named_parameters() if id(p) in to_master}


def gather(boosted: Boosted, shards: dict[str, Tensor], *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields each name with the whole tensor, on the CPU, made of all ranks' shards.

    A collective: every rank must run it to its end. Ranks other than 0 get empty tensors unless ``everywhere``.
    Names may be ``<parameter>/<moment>``.
    """
    shapes = {name: parameter.shape for name, parameter in boosted.network.named_parameters()}
    for name, shard in shards.items():
        shape = shapes[name.partition("/")[0]]
        whole = torch.empty(shard.numel() * dist.get_world_size(), dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(whole, shard.contiguous())
        if everywhere or dist.get_rank() == 0:
            yield name, whole[: shape.numel()].view(shape).cpu()
        else:
            yield name, whole[:0].cpu()


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, in the form, type and place of ``like``."""
    flat = whole.flatten()
    flat = functional.pad(flat, (0, like.numel() * dist.get_world_size() - flat.numel()))
    return flat.chunk(dist.get_world_size())[dist.get_rank()].to(like, copy=True)


@torch.no_grad()
def load_masters(boosted: Boosted, whole: dict[str, Tensor]) -> None:
    """Sets master weights, and from them the working weights, of every trainable parameter."""
    parameters = dict(boosted.network.named_parameters())
    for name, master in masters(boosted).items():
        master.copy_(shard_of(whole[name], master))
        parameters[name].copy_(whole[name])


def moments(boosted: Boosted) -> dict[str, Tensor]:
    """This rank's shards of Adam's moments as ``<parameter>/<moment>``; absent before a parameter's first step."""
    state = boosted.optimizer.optim.state
    return {
        f"{name}/{kind}": state[master][kind]
        for name, master in masters(boosted).items()
        for kind in MOMENTS
        if master in state
    }


def load_moments(boosted: Boosted, whole: dict[str, Tensor], steps: dict[str, int]) -> None:
    """Sets Adam's moments, and how many steps each parameter has been through."""
    state = boosted.optimizer.optim.state
    for name, master in masters(boosted).items():
        if name in steps:
            state[master] = {"step": steps[name]} | {
                kind: shard_of(whole[f"{name}/{kind}"], master) for kind in MOMENTS
            }


def moment_steps(boosted: Boosted) -> dict[str, int]:
    """How many steps of Adam each parameter has been through."""
    state = boosted.optimizer.optim.state
    return {name: int(state[master]["step"]) for name, master in masters(boosted).items() if master in state}
