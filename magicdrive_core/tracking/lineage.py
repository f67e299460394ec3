"""Lineage of a result: the commit, DVC's digests of its inputs, the Prefect run, the profile."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

from magicdrive_core.config.schema import Config, fingerprint
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json, sha256_file

# Inputs of a run, and in each the index file whose digest stands for it where DVC has none.
INPUTS = {
    "artifacts/infos": "infos.json",
    "artifacts/conditions": "clips.json",
    "artifacts/encoders": "encoders.json",
    "artifacts/text": "index.json",
    "artifacts/latents": "index.json",
}


RUN_NOTE = "mlflow.json"  # file in a folder of results: the MLflow run that describes them


def read_run_note(folder: Path) -> dict[str, str]:
    """Read what is known of the MLflow run that describes a folder of results.

    Args:
        folder: The folder of a training run or of a submission.

    Returns:
        ``run``, its id; for a stage that MLflow has completely also ``model_version``. Empty where MLflow does not know
        the folder yet, or the note is damaged.
    """
    note = folder / RUN_NOTE
    try:
        content = read_json(note) if note.is_file() else {}
    except MagicDriveError:  # a run that is opened again repairs it
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def input_digests(project: Path) -> dict[str, str]:
    """Find a digest of each input of a run: infos, conditions, encoders, text and latents.

    Args:
        project: The project's folder, which holds ``dvc.lock`` and the inputs.

    Returns:
        By path below the project: the MD5 of the input in ``dvc.lock``; without one, the first 32 hex digits of the
        SHA-256 of its index file; without that, "absent".

    Raises:
        MagicDriveError: ``dvc.lock`` is not YAML.
    """
    locked = _locked(project / "dvc.lock")
    return {path: locked.get(path) or _index_digest(project / path / index) for path, index in INPUTS.items()}


def _index_digest(index: Path) -> str:
    return sha256_file(index)[:32] if index.is_file() else "absent"


def _locked(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    except yaml.YAMLError as error:
        raise MagicDriveError(f"{lock} is not valid YAML", "delete dvc.lock, then run: dvc repro") from error
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def lineage_tags(config: Config, project: Path = Path()) -> dict[str, str]:
    """Collect the lineage of a result as tags of an MLflow run.

    Args:
        config: All settings; their profile and fingerprint become tags.
        project: The project's folder.

    Returns:
        Text by tag: ``profile``, ``params`` (12 hex digits), ``dvc.<input>``, ``git.commit``, ``git.dirty`` ("true" or
        "false") and ``prefect.flow_run``. Unknown facts (no repository, no flow) have no tag.

    Raises:
        MagicDriveError: ``dvc.lock`` is not YAML.
    """
    tags = {"profile": config.profile, "params": fingerprint(config)[:12]}
    tags |= {f"dvc.{Path(path).name}": digest for path, digest in input_digests(project).items()}
    commit = _git(project, "rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit
        tags["git.dirty"] = str(bool(_git(project, "status", "--porcelain", "--untracked-files=no"))).lower()
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        tags["prefect.flow_run"] = os.environ["PREFECT__FLOW_RUN_ID"]
    return tags


def _git(project: Path, *arguments: str) -> str:
    """Run a git command and return its output, or "" without git or a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
