"""Verbs for bundles of a trained network: ``magicdrive bundle``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, Params, Set, read_config

app = typer.Typer(no_args_is_help=True, help="Write, check and compare bundles of a trained network.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The bundle.")]


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; its name is the bundle's name.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights, for the model card.")],
    notes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown for the model card: intended use, limits.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="fidelity.json to quote; default: that of these settings.")
    ] = None,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Write network, VAE, text encoder and model card of a finished training into one folder.

    Example: magicdrive bundle write town --licence Apache-2.0 --notes limits.md
    """
    from magicdrive_core.experiment.bundle_writer import write_bundle

    facts = write_bundle(read_config(params, overrides), folder, licence=licence, notes=notes, figures=figures)
    size = sum((folder / name).stat().st_size for name in facts["files"])
    print(f"{folder}: {len(facts['files'])} files, {size / 1e6:.1f} MB")


@app.command()
def check(folder: Folder) -> None:
    """Compare every file of a bundle with its recorded digest.

    Example: magicdrive bundle check starter
    """
    from magicdrive_core.tracking.bundle import verify_bundle

    facts = verify_bundle(folder)
    print(f"{folder}: {len(facts['files'])} files are as they were written; {facts['stage']} of {facts['profile']}")


@app.command()
def compare(
    folder: Folder,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another bundle, or a fidelity.json.")],
) -> None:
    """Print the figures of a bundle beside those of another training.

    Example: magicdrive bundle compare starter outputs/starter
    """
    from magicdrive_core.experiment.bundle_writer import figure_lines
    from magicdrive_core.tracking.bundle import read_bundle
    from magicdrive_core.utils.files import read_json

    measured = read_bundle(other)["figures"] if other.is_dir() else read_json(other, "magicdrive fidelity measures it")
    for line in figure_lines(read_bundle(folder)["figures"], measured):
        print(line)
