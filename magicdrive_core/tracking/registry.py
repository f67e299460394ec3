"""Registered models by their MLflow names: models:/NAME@ALIAS and models:/NAME/VERSION.

A training run registers its weights in their folder, with their digest (``Store.register``). An alias may move at any
time, a version never does, so work in several processes names the version (``pin_registered``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from mlflow.exceptions import MlflowException

from magicdrive_core.config.schema import Tracking
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.tracking.runs import SHA256, Store
from magicdrive_core.utils.files import read_json

SCHEME = "models:/"
_NAME = re.compile(rf"{SCHEME}(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    uri: str  # models:/NAME/VERSION
    folder: Path  # of the training run: ema.safetensors, run.json


def find_registered(tracking: Tracking, uri: str, project: Path = Path()) -> Registered:
    """Find the version of a registered model that a name refers to now.

    Args:
        tracking: Settings of MLflow.
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        project: The project's folder.

    Returns:
        The version by its number, whichever form ``uri`` has, and the folder of its weights.

    Raises:
        UsageError: ``uri`` has another form, or the registry has no such model.
        MagicDriveError: The folder of its weights is missing, or the weights have changed.
    """
    match = _NAME.fullmatch(uri)
    if match is None:
        raise UsageError(f"{uri} is not the name of a registered model", f"{SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION")
    client, name = Store(tracking, project).client, match["name"]
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(name, match["alias"])
        else:
            version = client.get_model_version(name, match["version"])
    except MlflowException:
        known = ", ".join(
            f"{model.name}@{alias}" for model in client.search_registered_models() for alias in model.aliases
        )
        raise UsageError(
            f"{uri} is not in the registry of {tracking.uri}", f"known: {known or 'no model, train one first'}"
        ) from None
    found = f"{SCHEME}{name}/{version.version}"
    weights = Path(unquote(urlparse(version.source).path))
    run = read_json(weights.parent / "run.json", f"{found} was registered there: restore the folder")
    if run["weights_sha256"] != version.tags.get(SHA256):
        raise MagicDriveError(
            f"{weights} has changed since it was registered as {found}", "name the version of the later training"
        )
    return Registered(found, weights.parent)
