"""Measures control fidelity of a project's network: the step behind ``magicdrive fidelity``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from magicdrive_core.config.schema import Config
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.errors import UsageError
from magicdrive_core.evaluation.condition_swap import FIELDS, draw_swapped
from magicdrive_core.evaluation.control_fidelity import ControlFidelity, table_lines
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.models import write_untrained
from magicdrive_core.tracking.runs import log_results
from magicdrive_core.utils.files import read_json, write_json


def measure_fidelity(config: Config, sheet_scenes: Sequence[int] | None = None) -> tuple[list[str], Path]:
    """Measures whether generated pictures show what their conditions say, where they say it.

    The trained network is compared with an untrained one and with the trained one under swapped conditions. The
    results are written beside the generated clips and logged to the training's MLflow run.

    Args:
        config: settings of a generated city, which alone has exact regions.
        sheet_scenes: validation scenes, counted from 0, that the contact sheet shows; None: its own choice.

    Returns:
        The table's lines, and the folder of the results.

    Raises:
        UsageError: the data is not a generated city.
        MagicDriveError: no finished training.
    """
    if config.synth is None:
        raise UsageError("synth is null, and only a generated city has exact regions", "magicdrive use learn")
    paths = find_run_paths(config)
    model = paths.trained_model()
    control = ControlFidelity(config)
    others = [control.scenes[other] for other in control.others]
    items = [item for item in list_items(config, read_scenes(Path("artifacts/infos"))) if item.generation == 0]
    generate_items(config, items, model.folder, paths.generated)
    out = paths.generated.with_name(paths.generated.name.replace("generate", "fidelity"))
    write_untrained(config, model.stage, out / "untrained")
    generate_items(config, items, out / "untrained", out / "untrained/items")
    swapped = {what: draw_swapped(config, model.folder, control.scenes, others, what) for what in FIELDS}
    table = control.compare(paths.generated, out / "untrained/items", swapped)
    values = {name: row.row() for name, row in table.items()}
    finite = {name: {key: v if math.isfinite(v) else None for key, v in row.items()} for name, row in values.items()}
    write_json(out / "fidelity.json", finite)  # a picture's PSNR against itself has no number
    control.write_sheet(paths.generated, out / "untrained/items", out / "fidelity.png", sheet_scenes)
    run = read_json(model.result).get("run")
    if run:
        metrics = {f"fidelity/{name}": value for name, value in values["generated"].items()}
        log_results(config, run, metrics, out / "fidelity.png")
    return table_lines(table), out
