"""The network at the first step of a stage: new in stage 1, then with the EMA weights of the previous stage."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.encoders.caches import TextCache
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.model.build import build_stage_network
from magicdrive_core.model.transformer import MagicDrive

logger = logging.getLogger(__name__)

# Prefixes of the names that a stage adds to the network of the previous stage (model card).
NEW_IN_STAGE: dict[Stage, tuple[str, ...]] = {
    "stage2": ("base_blocks_t.", "control_blocks_t.", "bbox_embedder.mean_var"),
    "stage3": (),
}


def first_network(config: Config, plan: StagePlan, project: Path = Path()) -> MagicDrive:
    """Build the network before its first step, equal on all ranks.

    Args:
        config: model, seed, what is frozen.
        plan: the stage; its previous stage is finished.
        project: the project's folder.

    Returns:
        The network in fp32 on the CPU; with ``freeze_text`` its text embedder requires no gradient.

    Raises:
        MagicDriveError: the weights of the previous stage do not fit.
    """
    stage = config.training.stage(plan.stage)
    torch.manual_seed(stage.seed)  # the same on all ranks: nothing later draws from this generator
    network = build_stage_network(config, plan.stage, project)
    if plan.previous is None:
        text = TextCache(project / "artifacts/text")
        network.set_text_buffers(text.class_features, text.base_feature)
    else:
        load_previous(network, load_file(plan.previous.weights), plan.stage, plan.previous.weights)
    if stage.freeze_text:
        network.y_embedder.requires_grad_(False)
    return network


def load_previous(network: nn.Module, weights: dict[str, Tensor], stage: Stage, source: Path) -> list[str]:
    """Load the weights of the previous stage.

    Args:
        network: this stage's network; changed in place.
        weights: the previous stage's EMA weights, by name.
        stage: whose additions may be missing.
        source: file of the weights, for messages.

    Returns:
        The names that the stage adds, which stay as initialised.

    Raises:
        MagicDriveError: a name is missing or unexpected that the stage does not allow, or a shape differs.
    """
    own = network.state_dict()
    new = [name for name in own if name not in weights]
    missing = [name for name in new if not name.startswith(NEW_IN_STAGE[stage])]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    for fault, names in (("lacks", missing), ("has the unknown", unexpected), ("has another shape for", reshaped)):
        if names:
            logger.error("%s %s: %s", source, fault, ", ".join(names))
            raise MagicDriveError(
                f"{source} {fault} {names[0]} ({len(names)} in all): it belongs to another network",
                "train the previous stage with the same model section",
            )
    network.load_state_dict(weights, strict=False)
    logger.info("%s: %d tensors from %s, %d new: %s", stage, len(weights), source, len(new), ", ".join(new) or "none")
    return new
