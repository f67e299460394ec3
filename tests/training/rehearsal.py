"""One rank of a training group of 64, played by one process: the real loop on tensors without contents.

``python -m tests.training.rehearsal '<JSON list of roles>'`` plays roles one after the other and prints, as JSON, what
each rank asks of the others in its first step: the collectives of the devices with their ranks, data types and sizes,
and those of the control group. Only what needs numbers is replaced: reading results, and writing the weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import parse_size
from magicdrive_core.encoders.vae import latent_shape
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.model.build import build_network
from magicdrive_core.model.inputs import blank_conditions
from magicdrive_core.model.published.checkpoint import PUBLISHED_XL
from magicdrive_core.parallel import control
from magicdrive_core.training import engine, loop, recorder
from magicdrive_core.training.loader import Batch
from tests.training.tiny_rank import NeverStop

PROFILE = Path(__file__).resolve().parents[2] / "profiles/nuscenes.yaml"
ADAMW = torch.optim.AdamW
META = torch.device("meta")


class MetaAccelerator(engine.GlooAccelerator):
    def get_current_device(self) -> torch.device:
        return META


class Collectives(TorchDispatchMode):
    """Notes every collective of the devices, in its order."""

    def __init__(self, notes: list[list[Any]]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function._schema.name.split("::")
        if space in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            tensors = list(_tensors(args))
            sizes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
            self._notes.append([name.strip("_"), _ranks(args), sizes])
        return function(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _ranks(values: Any) -> list[int]:
    for value in reversed(values):  # the operation of a reduction is named before the group
        if isinstance(value, str):
            return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(value))
        with suppress(RuntimeError):  # of a script object of another kind
            if isinstance(value, torch.ScriptObject):
                return dist.get_process_group_ranks(dist.ProcessGroup.unbox(value))
    raise AssertionError(values)


def unfused(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    """Make AdamW without the fused kernel, which refuses tensors without contents; nothing of it is communicated."""
    return ADAMW(parameters, **(settings | {"fused": False, "foreach": True}))


class OneClip:
    """A loader of one micro-batch: a clip of a size and length, whose tensors have shapes only."""

    def __init__(self, sizes: Any, resolution: str, frames: int) -> None:
        self.buckets = [mock.Mock()]
        self.buckets[0].name = f"{resolution}-{frames}"
        shape = (1, 6, sizes.latent_channels, *latent_shape(frames, *parse_size(resolution)))
        latents = torch.zeros(shape, device=META)
        conditions = blank_conditions(sizes, frames, slots=20, device=META)
        mask = torch.ones(1, shape[3], dtype=torch.bool, device=META) if frames > 1 else None
        generator = torch.Generator()
        self._batch = Batch(
            0, (frames, *parse_size(resolution)), latents, conditions, mask, torch.zeros(1), latents, generator, 1.0
        )

    def start(self, *_: Any) -> None: ...

    def next(self) -> Batch:
        return self._batch

    def __enter__(self) -> OneClip:
        return self

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def noted_control(notes: list[list[Any]], world: int) -> Iterator[None]:
    """Replace the control group: every other rank answers as this one does."""

    def note(name: str, answer: Any) -> Any:
        def call(*given: Any) -> Any:
            notes.append(["control", name])
            return answer(*given)

        return call

    answers = {
        "gather": lambda own: [own] * world,
        "from_leader": lambda value: value,
        "any_rank": list,
        "barrier": lambda: None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(control, name, note(name, answer)))
        yield


def play(rank: int, share: int, resolution: str, frames: int, depth: int, control_depth: int, world: int = 64) -> Any:
    """Make the first step of stage 3 as one rank.

    Args:
        rank: of the group.
        share: ranks that share a clip.
        resolution: height and width of this rank's clip in pixels.
        frames: of this rank's clip.
        depth: spatial blocks, as many temporal ones; 28 in the XL network.
        control_depth: layers with control blocks; 13 in the XL network.
        world: ranks of the group.

    Returns:
        Everything that this rank asks of others, in order.
    """
    config = load_config(PROFILE, ["training.stage3.steps=1", f"cluster.sequence_parallel={share}"])
    sizes = replace(PUBLISHED_XL, published=False, depth=depth, control_depth=control_depth)
    dist.init_process_group("fake", rank=rank, world_size=world)
    engine.set_accelerator(MetaAccelerator())
    with META:
        network = build_network(sizes)
    network.y_embedder.requires_grad_(False)
    notes: list[list[Any]] = []
    plan = StagePlan("stage3", Path(tempfile.mkdtemp()), "f" * 64, {}, None)
    loader: Any = OneClip(sizes, resolution, frames)
    with (
        noted_control(notes, world),
        mock.patch.object(engine, "read_from_device", lambda values: [1.0] * len(values)),
        mock.patch.object(loop, "device_memory", return_value=None),
        mock.patch.object(loop, "write_result"),
        mock.patch.object(recorder, "peak_tflops", return_value=None),
        mock.patch.object(torch.optim, "AdamW", unfused),
        Collectives(notes),
    ):
        code = loop.train(config, plan, network, loader, None, NeverStop(), META)
    assert code == 0
    dist.destroy_process_group()
    return notes


if __name__ == "__main__":
    print(json.dumps([play(**role) for role in json.loads(sys.argv[1])]))
