"""The network before its first step, in the place of a finished training: what generation makes without learning."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from magicdrive_core.config import Config, Stage
from magicdrive_core.files import atomic_file, sha256_file, write_json
from magicdrive_core.model.build import build_network


def write_untrained(config: Config, stage: Stage, folder: Path, project: Path = Path()) -> None:
    """Writes initial weights of a stage's network and their ``run.json``, as a finished training leaves them.

    Raises:
        MagicDriveError: the project's encoders are not made yet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.stage(stage).seed)
        state = build_network(config, stage, project).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "ema.safetensors") as partial:
        save_file(state, partial)
    facts = {"stage": stage, "published": config.published, "weights_sha256": sha256_file(folder / "ema.safetensors")}
    write_json(folder / "run.json", facts)
