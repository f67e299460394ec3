"""Verbs that measure what was learned, beside those of ``cli.py``.

Everything heavy is imported inside its verb.
"""

from __future__ import annotations

import math
from typing import Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, INFOS, Params, Set, read_config
from magicdrive_core.errors import MagicDriveError, UsageError

app = typer.Typer()


@app.command()
def fidelity(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    scenes: Annotated[
        list[int] | None, typer.Option("--scene", metavar="N", help="N-th validation scene, from 0, for the sheet.")
    ] = None,
) -> None:
    """Measure whether generated pictures of the generated city show what their conditions say, where they say it."""
    from magicdrive_core.data.infos import read_scenes
    from magicdrive_core.evaluation.condition_swap import FIELDS, draw_exchanged
    from magicdrive_core.evaluation.control_fidelity import Control, table_lines
    from magicdrive_core.experiment.run_paths import find_run_paths
    from magicdrive_core.inference.generate import generate_items
    from magicdrive_core.inference.items import list_items
    from magicdrive_core.inference.models import write_untrained
    from magicdrive_core.tracking.runs import log_results
    from magicdrive_core.utils.files import read_json, write_json

    config = read_config(params, overrides)
    if config.synth is None:
        raise UsageError(
            f"{params}: synth is null, and only a generated city has exact regions", "magicdrive use learn"
        )
    paths = find_run_paths(config)
    if not paths.model.done:
        raise MagicDriveError(f"{paths.model.folder} holds no finished training", "python -m flows.train")
    control = Control(config)
    others = [control.scenes[other] for other in control.others]
    items = [item for item in list_items(config, read_scenes(INFOS)) if item.generation == 0]
    generate_items(config, items, paths.model.folder, paths.generated)
    out = paths.generated.with_name(paths.generated.name.replace("generate", "fidelity"))
    write_untrained(config, paths.model.stage, out / "untrained")
    generate_items(config, items, out / "untrained", out / "untrained/items")
    exchanged = {what: draw_exchanged(config, paths.model.folder, control.scenes, others, what) for what in FIELDS}
    table = control.compare(paths.generated, out / "untrained/items", exchanged)
    values = {name: row.row() for name, row in table.items()}
    finite = {name: {key: v if math.isfinite(v) else None for key, v in row.items()} for name, row in values.items()}
    write_json(out / "fidelity.json", finite)  # a picture's PSNR against itself has no number
    control.write_sheet(paths.generated, out / "untrained/items", out / "fidelity.png", scenes)
    run = read_json(paths.model.result).get("run")
    if run:
        log_results(
            config, run, {f"fidelity/{name}": v for name, v in values["generated"].items()}, out / "fidelity.png"
        )
    for line in table_lines(table):
        print(line)
    print(out)
