"""A network of a few hundred weights, for tests of the training alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from magicdrive_core.config.schema import Training
from tests.model.networks import config

if TYPE_CHECKING:
    from magicdrive_core.training.engine import Engine


class TinyNetwork(nn.Module):
    """Mixes the channels of each position, conditioned on time; ``video`` is used for several frames only."""

    def __init__(self, channels: int = 4, width: int = 7) -> None:
        super().__init__()
        self.into = nn.Linear(channels + 1, width)
        self.unused = nn.Linear(3, 3)  # trainable, but in no forward pass
        self.video = nn.Linear(width, width)
        self.out = nn.Linear(width, channels)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("table", torch.arange(5.0))
        self.final_layer = nn.Identity()
        self.config = config(latent_channels=channels)  # tells the shape of a clip

    def blocks(self) -> tuple[nn.Module, ...]:
        """There are none to slice or to checkpoint."""
        return ()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        conditions: object = None,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        tokens = x.movedim(2, -1)
        time = (timestep / 1000).view(-1, *[1] * (tokens.ndim - 1)).expand(*tokens.shape[:-1], 1)
        hidden = self.into(torch.cat([tokens, time], -1).to(self.into.weight.dtype)).tanh()
        if x.shape[3] > 1:
            hidden = hidden + self.video(hidden)
        return self.out(hidden).float().movedim(-1, 2)


def tiny_network(seed: int = 0) -> TinyNetwork:
    torch.manual_seed(seed)
    return TinyNetwork()


def engine_of(network: nn.Module, settings: Training) -> Engine:
    """Build the engine of a network on CPU ranks as the training loop does."""
    from magicdrive_core.parallel.gradient_order import arrival_order
    from magicdrive_core.training.engine import build_engine

    made: Any = network
    return build_engine(made, settings, torch.device("cpu"), arrival_order(made))


def stage(**changes: object) -> dict[str, object]:
    """Return the settings of a stage of small trainings."""
    return {
        "buckets": [{"resolution": "16x16", "frames": 1, "batch": 2}, {"resolution": "16x16", "frames": 9, "batch": 1}],
        "steps": 8,
        "learning_rate": 0.01,
        "warmup": 2,
        "seed": 3,
    } | changes


def training(**changes: object) -> Training:
    """Return the shared settings of small trainings in fp32."""
    values = {
        **dict.fromkeys(("stage1", "stage2", "stage3"), stage()),
        "precision": "fp32",
        "eps": 1e-8,
        "ema": 0.9,
        "checkpoint_every": 3,
        "preview_every": 100,
    }
    return Training.model_validate(values | changes)
