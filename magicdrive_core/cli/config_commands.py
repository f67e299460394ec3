"""Verbs for settings: ``magicdrive use`` and ``magicdrive config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, Params, Set, read_config, write_or_print

app = typer.Typer()
config_app = typer.Typer(no_args_is_help=True, help="Show and explain the settings.")
app.add_typer(config_app, name="config")


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="A file of profiles/, without .yaml: demo, learn, mini, nuscenes.")],
    overrides: Set = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a params.yaml that was changed by hand.")] = False,
) -> None:
    """Write params.yaml from a profile.

    Example: magicdrive use mini -S data.root=/data/nuscenes
    """
    from magicdrive_core.config.profiles import use_profile

    use_profile(profile, overrides or [], force=force)


@config_app.command()
def show(
    section: Annotated[str | None, typer.Argument(help="For example training.stage1; default: all.")] = None,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """List the settings that hold now. Columns: key, value, default or set, meaning.

    Example: magicdrive config show generate
    """
    from magicdrive_core.config.describe import show_settings

    for line in show_settings(read_config(params, overrides), section):
        print(line)


@config_app.command()
def explain(
    key: Annotated[str, typer.Argument(help="For example generate.guidance.")],
    params: Params = DEFAULT_PARAMS,
) -> None:
    """Explain one setting. Meaning, type, bounds, unit, default, source, where it is used, its value now.

    Example: magicdrive config explain training.stage1.steps
    """
    from magicdrive_core.config.describe import current_value, find_setting

    setting = find_setting(key)
    for line in setting.lines():
        print(line)
    if params.is_file() and (value := current_value(read_config(params, None), setting)):
        print(f"  now:     {value} ({params})")


@config_app.command()
def schema(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead of printing it.")] = None,
) -> None:
    """Write the JSON schema of params.yaml. Editors complete keys and mark faults with it.

    Example: magicdrive config schema --out params.schema.json
    """
    from magicdrive_core.config.describe import json_schema

    write_or_print(json_schema(), out)


@config_app.command()
def reference(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead of printing it.")] = None,
) -> None:
    """Write the reference page of all settings.

    Example: magicdrive config reference --out docs/reference/settings.md
    """
    from magicdrive_core.config.describe import reference_page

    write_or_print(reference_page(), out)
