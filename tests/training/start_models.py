"""Projects with a small network's encoders and a trained model, for tests of how a training starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.experiment.stages import StagePlan, plan_stage
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.utils.files import sha256_file, write_json

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
SMALL = [
    "model={width: 32, depth: 1, heads: 2, control_depth: 1, temporal_heads: 2, box_widths: [8], map_channels: [4, 4]}",
    "text.max_tokens=5",
]


def config(*overrides: str) -> Config:
    return load_config(PROFILE, [*SMALL, "training.start_from=model", *overrides])


def write_run(folder: Path, state: dict[str, torch.Tensor], stage: Stage, **facts: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "ema.safetensors")
    digest = sha256_file(folder / "ema.safetensors")
    write_json(folder / "run.json", {"stage": stage, "weights_sha256": digest, "run": None} | facts)


def filled(project: Path, stage: Stage, value: float) -> dict[str, torch.Tensor]:
    state = build_stage_network(config(), stage, project).state_dict()
    return {name: torch.full_like(tensor, value) for name, tensor in state.items()}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with encoders, and a model of stage 3 whose weights are all 3."""
    encoders = {
        "vae": {"latent_channels": 4, "digest": "v", "scaling_factor": 1.0},
        "text": {"width": 8, "digest": "t"},
    }
    write_json(tmp_path / "artifacts/encoders/encoders.json", encoders)
    write_run(tmp_path / "model", filled(tmp_path, "stage3", 3.0), "stage3")
    return tmp_path


def plan_of(project: Path, stage: Stage, *overrides: str) -> StagePlan:
    return plan_stage(config(*overrides), stage, project)
