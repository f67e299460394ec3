"""The network at the first step of a stage.

It has the weights of the previous stage, of the model that the training starts from, or initial ones.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.encoders.caches import TextCache
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.training.lora import add_adapters
from magicdrive_core.training.trainable import freeze_parameters
from magicdrive_core.training.weights_fit import NEW_IN_STAGE, compare, compare_start, shapes_of

logger = logging.getLogger(__name__)


def first_network(config: Config, plan: StagePlan, project: Path = Path()) -> MagicDrive:
    """Build the network before its first step, equal on all ranks.

    Args:
        config: model, seed, what is trained.
        plan: the stage; its previous stage is finished.
        project: the project's folder.

    Returns:
        The network in fp32 on the CPU, with adapters where the settings want them; what is not trained requires no
        gradient.

    Raises:
        UsageError: a pattern of the settings matches nothing, or nothing is trained.
        MagicDriveError: the weights of the previous stage or of the model to start from do not fit, or have changed.
    """
    stage = config.training.stage(plan.stage)
    torch.manual_seed(stage.seed)  # the same on all ranks: nothing later draws from this generator
    network = build_stage_network(config, plan.stage, project)
    new = set(network.state_dict())
    if plan.start is not None:
        plan.start.verify()
        new &= set(load_start(network, load_file(plan.start.weights), plan))
    elif plan.previous is None:
        text = TextCache(project / "artifacts/text")
        network.set_text_buffers(text.class_features, text.base_feature)
    if plan.previous is not None:
        new &= set(load_previous(network, load_file(plan.previous.weights), plan.stage, plan.previous.weights))
    if plan.start is not None or plan.previous is not None:
        logger.info("%s: %d new tensors: %s", plan.stage, len(new), ", ".join(sorted(new)) or "none")
    if stage.freeze_text:
        network.y_embedder.requires_grad_(False)
    freeze_parameters(network, config.training, plan.stage, new)
    if config.training.lora is not None:
        add_adapters(network, config.training.lora)
    return network


def load_start(network: nn.Module, weights: dict[str, Tensor], plan: StagePlan) -> list[str]:
    """Load the model that a training starts from.

    Args:
        network: the stage's network; changed in place.
        weights: the model's weights, by name.
        plan: the stage, and the model.

    Returns:
        The names that the model lacks, which stay as initialised.

    Raises:
        MagicDriveError: the model belongs to another network.
    """
    fit = compare_start(shapes_of(network.state_dict()), shapes_of(weights), plan)
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name not in fit.left}, strict=False)
    return fit.new


def load_previous(network: nn.Module, weights: dict[str, Tensor], stage: Stage, source: Path) -> list[str]:
    """Load the weights of the previous stage.

    Args:
        network: this stage's network; changed in place.
        weights: the previous stage's EMA weights, by name.
        stage: whose additions may be missing.
        source: file of the weights, for messages.

    Returns:
        The names that the stage adds, which stay as they are.

    Raises:
        MagicDriveError: a name is missing or unexpected that the stage does not allow, or a shape differs.
    """
    hint = "train the previous stage with the same model section"
    fit = compare(shapes_of(network.state_dict()), shapes_of(weights), source, hint, new=NEW_IN_STAGE[stage])
    network.load_state_dict(weights, strict=False)
    logger.info("%s: %d tensors from %s", stage, len(weights), source)
    return fit.new
