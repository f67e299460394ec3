"""Finds a trained network by its name: a registered model, the folder of a finished run, or a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Stage, Tracking
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.bundle import BUNDLE, NETWORK, read_bundle
from magicdrive_core.tracking.bundle import HINT as BUNDLE_HINT
from magicdrive_core.utils.files import read_json, sha256_file

REGISTERED = "models:/"  # prefix of the names of registered models
HINT = "name models:/NAME@ALIAS, the folder of a finished stage or of magicdrive import-checkpoint, or a bundle"


@dataclass(frozen=True)
class FoundModel:
    """A trained network that exists.

    Attributes:
        name: as the settings may name it; that of a registered model has its version.
        folder: of a finished run: ``ema.safetensors`` and ``run.json``.
        stage: whose network it is.
        sha256: digest of the weights, as their run recorded it.
    """

    name: str
    folder: Path
    stage: Stage
    sha256: str

    @property
    def weights(self) -> Path:
        """File of the EMA weights: the network's state dict."""
        return self.folder / "ema.safetensors"

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of the run that made it."""
        return _run_facts(self.folder)

    def verify(self) -> None:
        """Read the weights and compare their digest with the recorded one.

        Raises:
            MagicDriveError: the file is missing, or it has changed.
        """
        if not self.weights.is_file() or sha256_file(self.weights) != self.sha256:
            raise MagicDriveError(
                f"{self.weights} is missing or has another digest than its run recorded",
                f"restore the file, or name another model than {self.name}",
            )


def find_model(tracking: Tracking, name: str, project: Path = Path()) -> FoundModel:
    """Find a trained network.

    Args:
        tracking: Settings of MLflow.
        name: models:/NAME@ALIAS, models:/NAME/VERSION, the folder of a run or the folder of a bundle.
        project: The project's folder; folders are relative to it.

    Returns:
        The network. Its weights are not read; ``FoundModel.verify`` does that.

    Raises:
        UsageError: the registry knows no such model.
        MagicDriveError: there is no model in the folder, or its facts are unusable.
    """
    if name.startswith(REGISTERED):
        from magicdrive_core.tracking.registry import find_registered  # seconds to import, needed here alone

        found = find_registered(tracking, name, project)
        name, folder = found.uri, found.folder
    elif (project / name / BUNDLE).is_file():
        folder = project / name / NETWORK
        recorded = read_bundle(project / name)["files"].get(f"{NETWORK}/ema.safetensors")
        if _run_facts(folder)["weights_sha256"] != recorded:
            raise MagicDriveError(f"{folder / 'run.json'} has another digest than {BUNDLE} recorded", BUNDLE_HINT)
    else:
        folder = project / name
    facts = _run_facts(folder)
    return FoundModel(name, folder, facts["stage"], facts["weights_sha256"])


def _run_facts(folder: Path) -> dict[str, Any]:
    facts = read_json(folder / "run.json", HINT)
    if not isinstance(facts, dict) or not {"stage", "weights_sha256"} <= facts.keys():
        raise MagicDriveError(f"{folder / 'run.json'} names no stage and weights_sha256", HINT)
    return facts
