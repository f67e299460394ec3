"""Checks of what a training starts from, of what it trains and whether its devices hold it, before its ranks start.

Networks are built on torch's meta device, which holds names and shapes and no numbers. The supervisor of a training,
which imports no torch, runs this module as a process: ``python -m magicdrive_core.training.check_start JOB PROJECT``.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.errors import ERROR_NOTE, MagicDriveError
from magicdrive_core.experiment.stages import StagePlan, read_job
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.training.memory_plan import check_device
from magicdrive_core.training.trainable import check_patterns, freeze_parameters, linear_maps
from magicdrive_core.training.weights_fit import compare_start, shapes_of
from magicdrive_core.utils.files import read_json, write_json

logger = logging.getLogger(__name__)


def check_start(config: Config, plan: StagePlan, project: Path = Path()) -> None:
    """Check the model that a training starts from, and the choice of what is trained.

    Args:
        config: all settings.
        plan: the stage.
        project: the project's folder, with its encoders.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left to train.
        MagicDriveError: the model has changed, or belongs to another network.
    """
    training = config.training
    whole = _without_numbers(config, "stage3", project)  # has the names of all stages
    parameters = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    check_patterns("training.train_only", training.train_only, parameters, "parameter")
    check_patterns("training.freeze", training.freeze, parameters, "parameter")
    if training.lora is not None:
        check_patterns("training.lora.targets", training.lora.targets, linear_maps(whole), "linear map")
    network = _without_numbers(config, plan.stage, project)
    if plan.start is not None:
        facts = plan.start.facts
        if facts.get("published", config.published) != config.published:
            raise MagicDriveError(
                f"{plan.start.name} belongs to a network with published: {str(facts['published']).lower()}",
                "set published to the same (docs/decisions/0003-published-switch.md)",
            )
        plan.start.verify()
        compare_start(shapes_of(network.state_dict()), _stored_shapes(plan.start.weights), plan)
        for fault in _other_encoders(facts, plan, project):
            logger.warning("%s: %s", plan.start.name, fault)
    freeze_parameters(network, training, plan.stage)


def _without_numbers(config: Config, stage: Stage, project: Path) -> nn.Module:
    with torch.device("meta"):
        return build_stage_network(config, stage, project)


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MagicDriveError(f"{path} is not a safetensors file: {error}", "name another model") from None


def _other_encoders(facts: dict[str, Any], plan: StagePlan, project: Path) -> list[str]:
    """List what shows that a model was trained with other encoders than the project's: its latents mean other things.

    A bundle records its encoders, other runs the digest of all of the folder ``artifacts/encoders``.
    """
    own = read_json(project / "artifacts/encoders/encoders.json")
    known = facts.get("encoders")
    if known is None:
        encoders = "artifacts/encoders"
        before = facts.get("inputs", {}).get(encoders)
        others = {"other encoders (vae, text)": before is not None and before != plan.inputs.get(encoders)}
    else:
        # A bundle's copy has another digest than the encoder that its project trained with; either is the same model.
        same = {
            kind: own[kind].get("digest") in (each.get("digest"), each.get("copied_from"))
            for kind, each in known.items()
        }
        factors = [each["vae"]["scaling_factor"] for each in (known, own)]
        others = {
            "another VAE (vae.path)": not same["vae"],
            "another scaling factor (vae.scaling_factor)": factors[0] != factors[1],
            "another text encoder (text.path)": not same["text"],
        }
    return [f"it was trained with {what} than this project uses" for what, other in others.items() if other]


def main() -> None:
    """Check the job of a folder; an error is left in the file that the supervisor names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        (config, plan), project = read_job(Path(sys.argv[1])), Path(sys.argv[2])
        check_start(config, plan, project)
        if config.cluster.device_gbytes is not None:
            check_device(config, plan.stage, config.cluster.device_gbytes * 1e9, project)
    except MagicDriveError as error:
        write_json(os.environ[ERROR_NOTE], [error.message, error.hint, error.exit_code])
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
