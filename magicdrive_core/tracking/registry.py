"""Models by the names under which MLflow's registry knows them: models:/NAME@ALIAS and models:/NAME/VERSION.

A training registers its weights where they lie (``Store.register``), with their digest. An alias may be moved at any
time, a version never: who works with several processes names the version (``pin_registered``).
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
    """The version that ``uri`` names now.

    Raises:
        UsageError: ``uri`` is of another form, or the registry knows no such model.
        MagicDriveError: its weights lie in no folder that can be reached from here, or are not those that were
            registered.
    """
    match = _NAME.fullmatch(uri)
    if match is None:
        raise UsageError(f"{uri} names no registered model", f"{SCHEME}NAME@ALIAS or {SCHEME}NAME/VERSION")
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
            f"{uri} is not in the registry of {tracking.uri}", f"it knows {known or 'no model: train one first'}"
        ) from None
    found = f"{SCHEME}{name}/{version.version}"
    weights = Path(unquote(urlparse(version.source).path))
    run = read_json(weights.parent / "run.json", f"{found} was registered there: bring that folder back")
    if run["weights_sha256"] != version.tags.get(SHA256):
        raise MagicDriveError(
            f"{weights} is no more what was registered as {found}", "name the version of the later training"
        )
    return Registered(found, weights.parent)
