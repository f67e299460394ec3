"""A rank that trains adapters on ``TinyNetwork`` as ``tiny_rank`` trains all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from tests.training.networks import TinyNetwork, tiny_network
from tests.training.tiny_rank import MadeUpLoader, NeverStop


def adapted_network(lora: Any) -> TinyNetwork:
    """``into``, ``video`` and ``out`` get adapters, and the bias of ``out`` is trained in full."""
    from magicdrive_core.training.lora import add_adapters
    from magicdrive_core.training.trainable import freeze_parameters
    from tests.training.networks import training

    network = tiny_network()
    torch.manual_seed(5)
    freeze_parameters(network, training(lora=lora, train_only=["out.bias"]), "stage1")
    add_adapters(network, lora)
    return network


def train_adapters(folder: Path) -> int:
    from magicdrive_core.experiment.stages import read_job
    from magicdrive_core.training.loop import train

    config, plan = read_job(folder)
    network: Any = adapted_network(config.training.lora)
    loader: Any = MadeUpLoader(3, RectifiedFlow(config.flow.base_pixels), "", folder / "order.jsonl")
    return train(config, plan, network, loader, None, NeverStop(), torch.device("cpu"))
