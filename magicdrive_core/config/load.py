"""Reads files of settings (params.yaml, edits), applies overrides of the command line and validates them.

A faulty file is refused with one line that names the key, its value and what would be valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from magicdrive_core.config.cluster_section import SECRETS
from magicdrive_core.config.schema import Config
from magicdrive_core.errors import UsageError


def load_config(path: Path | str = "params.yaml", overrides: list[str] | None = None) -> Config:
    """Reads and validates params.yaml.

    Args:
        path: the file.
        overrides: ``key.key=value`` texts of the command line's ``-S``; values are YAML.

    Returns:
        The validated settings.

    Raises:
        UsageError: unreadable file, unknown key, wrong type or impossible value, all in one line.
    """
    values = read_yaml(path, "run in the project's folder, or name the file with --params")
    if not isinstance(values, dict):
        raise UsageError(f"{path} is not a mapping of sections", "start from a profile: magicdrive use demo")
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str = "params.yaml") -> Config:
    """Validates a mapping as params.yaml.

    Args:
        values: sections by name.
        source: the file's name, for messages.

    Returns:
        The validated settings.

    Raises:
        UsageError: the first fault, in one line that names the key, its value and what would be valid.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{source}: {first_fault(error, Config)}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Writes ``key.key=value`` into nested ``values``.

    Args:
        values: sections by name; changed in place.
        override: the text, whose value is YAML.

    Raises:
        UsageError: the text has another form, or there is no such section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"-S {override}: write key.key=value", "for example -S training.stage1.steps=100")
    *parents, last = key.split(".")
    target: Any = values
    for parent in parents:
        target = target.get(parent) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise UsageError(f"-S {override}: there is no section {parent!r}")
    try:
        target[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"-S {override}: the value is not valid YAML") from None


def read_yaml(path: Path | str, hint: str) -> Any:
    """Reads a YAML file.

    Args:
        path: the file.
        hint: what to do where it is missing.

    Returns:
        The decoded value; None for an empty file.

    Raises:
        UsageError: the file is missing or not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", hint) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or the 45th of May
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def first_fault(error: ValidationError, model: type[BaseModel]) -> str:
    """Describes the first fault that the validation of values found.

    Args:
        error: all faults.
        model: the section that the values are for; its known keys are listed where a key is unknown.

    Returns:
        One line: the key, its value, what would be valid, and how many more faults there are.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{key} is not a known key{_suggestion(first['loc'], model)}{more}"
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    if first["loc"] and not key.startswith(SECRETS) and isinstance(first["input"], str | int | float | None):
        return f"{key} is {first['input']!r}: {message}{more}"
    return f"{key}: {message}{more}"


def _suggestion(location: tuple[int | str, ...], model: Any) -> str:
    """Lists the known keys of the section in which an unknown key was found."""
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) and hasattr(model, "model_fields") else None
        if field is None:
            return ""
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return ""
    return f"; known here: {', '.join(field.alias or name for name, field in model.model_fields.items())}"
