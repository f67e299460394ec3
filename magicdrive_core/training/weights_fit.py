"""Whether weights fit a network: their names and shapes, without a tensor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from magicdrive_core.config.schema import Stage
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import StagePlan

logger = logging.getLogger(__name__)

# Prefixes of the names that a stage adds to the network of the previous stage (model card).
NEW_IN_STAGE: dict[Stage, tuple[str, ...]] = {
    "stage1": (),
    "stage2": ("base_blocks_t.", "control_blocks_t.", "bbox_embedder.mean_var"),
    "stage3": (),
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fit:
    """How weights fit a network whose names and shapes they were compared with.

    Attributes:
        new: names that the network has and the weights lack; they stay as initialised.
        left: names that the weights have and the network lacks; they are not used.
    """

    new: list[str]
    left: list[str]


def compare(
    own: Shapes,
    found: Shapes,
    source: Path,
    hint: str,
    *,
    new: tuple[str, ...] = (),
    left: tuple[str, ...] = (),
) -> Fit:
    """Compare the names and shapes of weights with those of a network.

    Args:
        own: the network's shapes by name.
        found: those of the weights.
        source: file of the weights, for messages.
        hint: what to do where they do not fit.
        new: prefixes of names that the weights may lack.
        left: prefixes of names that the network may lack.

    Returns:
        What is new and what is left over.

    Raises:
        MagicDriveError: a name is missing or unknown, or a shape differs.
    """
    fit = Fit([name for name in own if name not in found], [name for name in found if name not in own])
    faults = {
        "lacks": [name for name in fit.new if not name.startswith(new)],
        "has the unknown": [name for name in fit.left if not name.startswith(left)],
        "has another shape for": [name for name in own if name in found and tuple(own[name]) != tuple(found[name])],
    }
    for fault, names in faults.items():
        if names:
            logger.error("%s %s: %s", source, fault, ", ".join(names))
            shapes = f": {list(found[names[0]])}, not {list(own[names[0]])}" if fault.startswith("has another") else ""
            raise MagicDriveError(
                f"{source} {fault} {names[0]}{shapes} ({len(names)} in all): it belongs to another network", hint
            )
    return fit


def compare_start(own: Shapes, found: Shapes, plan: StagePlan) -> Fit:
    """Compare the model that a training starts from with the network of a stage.

    A model without temporal blocks, of stage 1, fits every stage, and stage 1 leaves the temporal blocks of others out.

    Args:
        own: the network's shapes by name.
        found: those of the model.
        plan: the stage, and the model.

    Returns:
        What is new and what is left over.

    Raises:
        MagicDriveError: the model belongs to another network.
    """
    assert plan.start is not None
    temporal = NEW_IN_STAGE["stage2"]
    fit = compare(
        own,
        found,
        plan.start.weights,
        f"{plan.start.name}: use the sections model, text and vae that it was trained with",
        new=temporal if plan.start.stage == "stage1" and plan.stage != "stage1" else (),
        left=temporal if plan.start.stage != "stage1" and plan.stage == "stage1" else (),
    )
    used = len(found) - len(fit.left)
    logger.info("%s: %d tensors from %s, %d left over", plan.stage, used, plan.start.name, len(fit.left))
    return fit


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
