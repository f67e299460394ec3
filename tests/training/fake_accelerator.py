"""A training step and a generation on a device that holds no numbers, for what a CPU does not show.

``python -m tests.training.fake_accelerator`` registers the device "fakegpu" and runs the real code on tensors without
contents (``FakeTensorMode``): a tensor that is left on the CPU meets one on the device, and raises; so does every read
of a number, as it would make the host wait. Only ``read_from_device`` may read. Prints what it found as JSON. It runs
in a process of its own, because the device cannot be unregistered.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.inference.guided_sampling import sample_latents
from magicdrive_core.model.inputs import blank_conditions
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel import control
from magicdrive_core.parallel.gradient_order import arrival_order
from magicdrive_core.training import engine, loop
from magicdrive_core.training.loader import Batch
from magicdrive_core.training.state import Ema
from tests.model.networks import network
from tests.training.networks import training

FRAMES, LATENTS = 9, (3, 4, 6)


def convert(module: nn.Module, *target: Any, **_: Any) -> nn.Module:
    """Stand for ``Module.to``, which cannot exchange parameters without contents."""
    for tensor in (*module.parameters(), *module.buffers()):
        changed = tensor.detach().to(*target)
        if changed.dtype != tensor.dtype and tensor.is_floating_point():
            tensor.data = changed
    return module


def train_one_step(device: torch.device, order: list[str], made: MagicDrive) -> dict[str, Any]:
    """Make a step in bf16 of a video with conditioning frames, and apply the averages as for a preview."""
    trained = engine.build_engine(made, training(precision="bf16"), device, order)
    ema = Ema(trained, 0.9)
    latents = torch.zeros(1, 6, made.config.latent_channels, *LATENTS)
    conditions = blank_conditions(made.config, FRAMES)  # on the CPU, as the loader makes them
    mask = torch.ones(1, LATENTS[0], dtype=torch.bool)
    batch = Batch(0, (FRAMES, 32, 48), latents, conditions, mask, torch.zeros(1), latents, torch.Generator(), 0.0)
    read: list[int] = []

    def numbers(values: Tensor) -> list[float]:
        read.append(len(values))
        return [1.0] * len(values)

    with (
        mock.patch.object(engine, "read_from_device", numbers),
        mock.patch.object(control, "any_rank", lambda flags: list(flags)),
    ):
        losses = []
        for _ in range(2):  # micro-batches
            losses.append(loop.flow_loss(trained, batch))
            trained.optimizer.backward(losses[-1].mean() / 2)
        trained.optimizer.read_passes(losses)
        trained.set_learning_rate(0.1)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        ema.update()
        with ema.applied():
            pass
    return {"device": str(losses[0].device), "reads": len(read)}


def generate(device: torch.device, made: MagicDrive) -> dict[str, Any]:
    """Sample a video under guidance, with the first latent frame given."""
    channels = made.config.latent_channels
    given = torch.zeros(1, 6, channels, *LATENTS, device=device)
    mask = torch.ones(1, LATENTS[0], device=device)
    conditions = blank_conditions(made.config, FRAMES).to(device)
    whole = mock.Mock(return_value=32)
    with mock.patch.object(FakeTensor, "__int__", whole, create=True):
        latents = sample_latents(
            made,
            conditions,
            LATENTS,
            steps=2,
            guidance=2.0,
            flow=RectifiedFlow(),
            generator=torch.Generator(),
            x_0=given,
            x_mask=mask,
        )
    return {"device": str(latents.device), "shape": list(latents.shape), "reads": whole.call_count}


def main() -> None:
    """Run everything once and print the results."""
    _setup_privateuseone_for_python_backend("fakegpu")
    device = torch.device("fakegpu:0")
    dist.init_process_group("fake", rank=0, world_size=2)
    accelerator = engine.GlooAccelerator()
    accelerator.get_current_device = lambda: device
    engine.set_accelerator(accelerator)
    order = arrival_order(network(depth=1))
    results: dict[str, Any] = {}
    with FakeTensorMode(), mock.patch.object(nn.Module, "to", convert):
        for published in (False, True):
            with device:
                made = network(depth=1, published=published)
            name = "published" if published else "own"
            results[f"{name} generation"] = generate(device, made)
            if not published:
                results["training"] = train_one_step(device, order, made)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
