"""Measures control fidelity of a project's network: the step behind ``magicdrive fidelity``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import UsageError
from magicdrive_core.evaluation.condition_swap import FIELDS, ClipPainter, Video
from magicdrive_core.evaluation.control_fidelity import (
    EVERY,
    GENERATED,
    RECONSTRUCTED,
    UNTRAINED,
    Comparison,
    ControlFidelity,
    Draw,
    region_lines,
    table_lines,
)
from magicdrive_core.evaluation.edit_response import Response
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.models import write_untrained
from magicdrive_core.tracking.lineage import read_run_note
from magicdrive_core.tracking.runs import best_effort, log_results
from magicdrive_core.utils.files import write_json


def measure_fidelity(
    config: Config,
    sheet_scenes: Sequence[int] | None = None,
    *,
    every: int = EVERY,
    clips: int | None = None,
    swaps: bool = True,
    edits: bool = True,
) -> tuple[list[str], Path]:
    """Measures whether generated videos show what their conditions say, where they say it.

    The trained network is compared with an untrained one, and with the trained one under swapped conditions and under
    edits. The results are written beside the generated clips and logged to the training's MLflow run.

    Args:
        config: settings of a generated city, which alone has exact regions.
        sheet_scenes: measured scenes, counted from 0, that the contact sheet shows; None: its own choice.
        every: one frame in so many is measured.
        clips: number of validation scenes that are generated and measured, of all lights in turn; None: all.
        swaps: whether condition swaps are measured: three more generations.
        edits: whether the response to edits is measured: up to three more generations.

    Returns:
        The tables' lines, and the folder of the results.

    Raises:
        UsageError: the data is not a generated city, or generation does not start from the scenes alone.
        MagicDriveError: no finished training, or too few validation scenes.
    """
    if config.synth is None:
        raise UsageError("synth is null, and only a generated city has exact regions", "magicdrive use learn")
    for name in ("edits", "initial_frames"):
        if getattr(config.generate, name) is not None:
            raise UsageError(
                f"generate.{name} is set, and fidelity compares with the scenes as they are", "set it to null"
            )
    paths = find_run_paths(config)
    model = paths.trained_model()
    control = ControlFidelity(config, every=every, clips=clips)
    others = control.others  # before any work: each light needs two scenes
    beyond = [number for number in sheet_scenes or () if number >= len(control.scenes)]
    if beyond:
        raise UsageError(f"--scene {beyond[0]}: {len(control.scenes)} scenes are measured, counted from 0")
    generate_items(config, list(control.items.values()), model.folder, paths.generated)
    out = paths.generated.with_name(paths.generated.name.replace("generate", "fidelity"))
    write_untrained(config, model.stage, out / "untrained")
    shown = control.sheet_scenes(sheet_scenes)
    painter, beginner = ClipPainter(config, model.folder), ClipPainter(config, out / "untrained")

    def edited(scene: Scene, edit: Edits) -> Video:
        return painter.edited(control.items[scene.token], scene, edit)

    def untrained(scene: Scene) -> Video:
        return beginner.edited(control.items[scene.token], scene, Edits())

    rows: dict[str, Draw] = {GENERATED: partial(control.read_item, paths.generated)}

    def swapped(what: str, scene: Scene) -> Video:
        return painter.swapped(control.items[scene.token], scene, others[scene.token], what)

    for what in FIELDS if swaps else ():
        rows[f"condition swap: {what} of another clip"] = partial(swapped, what)
    rows[UNTRAINED] = _keeping(untrained, shown)
    comparison = control.compare(rows)
    responses = control.respond(rows[GENERATED], edited, out / "edits.png") if edits else {}
    write_json(out / "fidelity.json", _finite(_figures(comparison, responses, control)))
    control.write_sheet(shown, {label: rows[label] for label in (GENERATED, UNTRAINED)}, out / "fidelity.png")
    run = read_run_note(model.folder).get("run")
    if run:
        what = f"{out / 'fidelity.json'} is not logged to the training's run"
        metrics = _metrics(comparison, responses)
        best_effort(what, lambda: log_results(config, run, metrics, out / "fidelity.png"))
    return _tables(comparison, responses), out


def _keeping(draw: Draw, scenes: Sequence[Scene]) -> Draw:
    """Keep the videos of some scenes, so that the contact sheet does not generate them again."""
    kept: dict[str, Video] = {}
    wanted = {scene.token for scene in scenes}

    def video(scene: Scene) -> Video:
        if scene.token in kept:
            return kept[scene.token]
        made = draw(scene)
        if scene.token in wanted:
            kept[scene.token] = made
        return made

    return video


def _tables(comparison: Comparison, responses: Mapping[str, Response]) -> list[str]:
    """Format regions, consistency and responses, one table below the other."""
    lines = region_lines(comparison.regions)
    consistency = {}
    for label in comparison.time:
        values = comparison.consistency(label)
        consistency[label] = {k: 100 * v if k.endswith("structure") else v for k, v in values.items()}
    lines += ["", *table_lines(consistency, digits=2)]
    if responses:
        lines += ["", *table_lines({kind: response.row() for kind, response in responses.items()}, digits=2)]
    return lines


def _figures(comparison: Comparison, responses: Mapping[str, Response], control: ControlFidelity) -> dict[str, Any]:
    """Collect what the JSON file holds."""
    ceiling = comparison.regions[RECONSTRUCTED]
    return {
        "scenes": [scene.name for scene in control.scenes],
        "frames": {scene.name: list(control.measured_frames(scene)) for scene in control.scenes},
        "regions": {label: row.row() for label, row in comparison.regions.items()},
        "shares": comparison.regions[GENERATED].shares_of(ceiling),
        "consistency": {label: comparison.consistency(label) for label in comparison.time},
        "edits": {kind: response.row() for kind, response in responses.items()},
    }


def _metrics(comparison: Comparison, responses: Mapping[str, Response]) -> dict[str, float]:
    """Collect MLflow's metrics of the generated videos."""
    values = {**comparison.regions[GENERATED].row(), **comparison.consistency(GENERATED)}
    shares = comparison.regions[GENERATED].shares_of(comparison.regions[RECONSTRUCTED])
    values |= {f"{name}_share": share for name, share in shares.items()}
    values |= {f"{kind.replace(' ', '_')}_response": response.share for kind, response in responses.items()}
    return {f"fidelity/{name}": value for name, value in values.items()}


def _finite(values: Any) -> Any:
    """Replace numbers that JSON cannot hold by null: a picture's PSNR against itself, and regions that are nowhere."""
    if isinstance(values, Mapping):
        return {key: _finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
