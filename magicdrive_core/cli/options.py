"""What the verbs share: their options, the folders of the DVC stages, and how the options are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magicdrive_core.errors import UsageError

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Config, Stage

INFOS, CONDITIONS, ENCODERS = Path("artifacts/infos"), Path("artifacts/conditions"), Path("artifacts/encoders")
TEXT, LATENTS = Path("artifacts/text"), Path("artifacts/latents")

Params = Annotated[Path, typer.Option("--params", metavar="FILE", help="The settings' file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a setting, e.g. -S training.stage1.steps=50."),
]
DEFAULT_PARAMS = Path("params.yaml")


def read_config(params: Path, overrides: list[str] | None) -> Config:
    """The settings that a verb works with.

    Raises:
        UsageError: they are wrong.
    """
    from magicdrive_core.config.load import load_config

    return load_config(params, overrides)


def read_stage(name: str) -> Stage:
    """A stage by its name.

    Raises:
        UsageError: there is no such stage.
    """
    from magicdrive_core.config.schema import STAGES

    if name not in STAGES:
        raise UsageError(f"there is no stage {name!r}", f"known: {', '.join(STAGES)}")
    return name
