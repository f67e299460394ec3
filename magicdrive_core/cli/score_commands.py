"""Verbs that say how good generated videos are, and hand their frames to other programs.

Everything heavy is imported inside its verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, INFOS, Params, Set, read_config
from magicdrive_core.errors import MagicDriveError

if TYPE_CHECKING:
    from magicdrive_core.data.records import Scene
    from magicdrive_core.wcoda.package import Package

app = typer.Typer()


@app.command()
def score(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """Score the package: Fréchet distances, and mAP and mIoU where scores names their files."""
    from magicdrive_core.evaluation.score_sheet import MEANINGS, SHEET, Sheet, question, score_package
    from magicdrive_core.experiment.run_paths import find_run_paths

    config = read_config(params, overrides)
    paths = find_run_paths(config)
    package, scenes = _packed(paths.submission)
    sheet = Sheet.read(paths.submission) if (paths.submission / SHEET).is_file() else None
    if sheet is None or sheet.question != question(config, package.sha256):
        sheet = score_package(config, package.folder, package.sha256, scenes)
        sheet.write(paths.submission)
    for name, value in sheet.figures.items():
        print(f"{name:10} {value:10.4f}  {MEANINGS[name]}")
    for line in sheet.missing:
        print(f"not scored: {line}")
    print(paths.submission / SHEET)


@app.command("export-frames")
def export_frames(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets gen0/, gen1/ and so on, a nuScenes root each.")],
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Write the generated key frames as nuScenes data roots, on which any detector runs unchanged."""
    from magicdrive_core.evaluation.key_frames import export_frames as write
    from magicdrive_core.experiment.run_paths import find_run_paths

    config = read_config(params, overrides)
    package, scenes = _packed(find_run_paths(config).submission)
    for generation in range(config.generate.generations):
        root = out / f"gen{generation}"
        count = write(config, package.folder, scenes, generation, root)
        print(f"{root}: {count} pictures, version {config.data.version}")


def _packed(benchmark: Path) -> tuple[Package, list[Scene]]:
    """The package, and the scenes that it holds, in the order of the infos."""
    from magicdrive_core.data.infos import read_scenes
    from magicdrive_core.video.item_record import item_name
    from magicdrive_core.wcoda.package import read_package

    package = read_package(benchmark)
    scenes = [s for s in read_scenes(INFOS) if (package.folder / item_name(s.first_sample, 0)).is_dir()]
    if not scenes:
        raise MagicDriveError(f"{package.folder} holds no scene of {INFOS}", "dvc repro infos, then magicdrive package")
    return package, scenes
