"""Verbs for the W-CODA package, for scores, control fidelity and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, Params, Set, read_config
from magicdrive_core.errors import MagicDriveError

app = typer.Typer()


@app.command()
def package(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """Pack the generated videos as W-CODA results.zip. The package is validated.

    Example: magicdrive package -S submission.team=owls
    """
    from magicdrive_core.wcoda.workflow import package_project

    _report_faults(*package_project(read_config(params, overrides)))


@app.command()
def validate(
    archive: Annotated[Path, typer.Argument(metavar="ZIP", help="A results.zip.")],
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Validate any W-CODA results.zip. It reads every name, every count and every frame of every video.

    Example: magicdrive validate results.zip
    """
    from magicdrive_core.wcoda.validator import validate as find_faults
    from magicdrive_core.wcoda.workflow import expected_package

    _report_faults(archive, find_faults(archive, expected_package(read_config(params, overrides))))


@app.command()
def score(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """Score the package. Fréchet distances; mAP and mIoU where the section scores names their files.

    Example: magicdrive score -S 'scores.detections=[gen0.json]'
    """
    from magicdrive_core.evaluation.score_sheet import MEANINGS
    from magicdrive_core.wcoda.workflow import score_project

    sheet, file = score_project(read_config(params, overrides))
    for name, value in sheet.figures.items():
        print(f"{name:10} {value:10.4f}  {MEANINGS[name]}")
    for line in sheet.missing:
        print(f"not scored: {line}")
    print(file)


@app.command("export-frames")
def export_frames(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for gen0/, gen1/, ..., a nuScenes root each.")],
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Write the generated key frames as nuScenes roots. Any detector runs on them unchanged.

    Example: magicdrive export-frames frames/
    """
    from magicdrive_core.wcoda.workflow import export_key_frames

    config = read_config(params, overrides)
    for root, count in export_key_frames(config, out):
        print(f"{root}: {count} pictures, version {config.data.version}")


@app.command()
def fidelity(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    scenes: Annotated[
        list[int] | None,
        typer.Option("--scene", metavar="N", min=0, help="Show the N-th measured scene, from 0, on the contact sheet."),
    ] = None,
    every: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Measure one frame in N; odd is best, as four share a latent frame."),
    ] = 3,
    clips: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Measure N validation scenes only, of all lights in turn."),
    ] = None,
    swaps: Annotated[bool, typer.Option(help="Measure condition swaps: three more generations.")] = True,
    edits: Annotated[bool, typer.Option(help="Measure the response to edits: up to three more generations.")] = True,
) -> None:
    """Measure control fidelity on the generated city. Do videos show what their conditions say, where they say it?

    Three tables: regions, consistency in time and between cameras, and response to edits.

    Example: magicdrive fidelity --clips 6 --every 5 --no-swaps
    """
    from magicdrive_core.evaluation.fidelity_run import measure_fidelity

    config = read_config(params, overrides)
    lines, folder = measure_fidelity(config, scenes, every=every, clips=clips, swaps=swaps, edits=edits)
    for line in lines:
        print(line)
    print(folder)


@app.command()
def report(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """Write report.html. It shows what was generated, from what, the losses, and the package if there is one.

    Example: magicdrive report
    """
    from datetime import datetime

    from magicdrive_core.report.project_report import report_project

    print(report_project(read_config(params, overrides), datetime.now()))


def _report_faults(archive: Path, faults: list[str]) -> None:
    """Prints the faults of an archive, one line each.

    Raises:
        MagicDriveError: there are faults.
    """
    for fault in faults:
        print(fault)
    if faults:
        raise MagicDriveError(f"{archive} is not a valid submission: {len(faults)} fault(s)", "see the lines above")
    print(f"{archive} is valid")
