"""Writes the report of a project and records it with MLflow: the step behind ``magicdrive report``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from magicdrive_core.config.schema import Config
from magicdrive_core.evaluation.score_sheet import SHEET, Sheet
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.report.page import write_report
from magicdrive_core.tracking.lineage import lineage_tags
from magicdrive_core.tracking.runs import best_effort, log_submission
from magicdrive_core.wcoda.package import MANIFEST, ZIP, read_package
from magicdrive_core.wcoda.validator import VERDICT, judge
from magicdrive_core.wcoda.workflow import expected_package


def report_project(config: Config, now: datetime) -> Path:
    """Writes report.html: what was generated, from what, the losses, and the package and its scores if there are any.

    The page and the package's files are then logged to the submission's MLflow run.

    Args:
        config: the settings.
        now: time that the page shows.

    Returns:
        The page's path.

    Raises:
        MagicDriveError: there are no generated clips, their inputs are missing, or MLflow's database cannot be used.
    """
    paths = find_run_paths(config)
    folder = paths.submission
    sheet = Sheet.read(folder) if (folder / SHEET).is_file() else None
    package = read_package(folder) if (folder / ZIP).is_file() else None
    lineage = lineage_tags(config) | paths.model_tags(config)
    page = write_report(
        config,
        paths.generated,
        folder,
        runs={plan.stage: plan.folder for plan in paths.stages},
        package=package,
        faults=judge(package.zip_path, expected_package(config)) if package else (),
        notes=paths.notes,
        lineage=lineage,
        made=f"{now:%Y-%m-%d %H:%M}",
        sheet=sheet if package and sheet and sheet.package == package.sha256 else None,
    )
    files = [page, folder / SHEET, folder / MANIFEST, folder / VERDICT]
    figures = sheet.figures if sheet else {}
    what = f"{folder} is not logged: run the same command again later"
    best_effort(what, lambda: log_submission(config, folder, figures, files, lineage))
    return page
