"""Writes a finished project's network, VAE and text encoder as a bundle with a model card; compares figures.

No torch: files are copied, and the card is made of what training, encoders and measurements recorded.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Config
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.tracking.bundle import BUNDLE, CARD, FORMAT, NETWORK, TEXT, VAE, verify_bundle
from magicdrive_core.tracking.lineage import lineage_tags
from magicdrive_core.utils.files import atomic_folder, read_json, sha256_file, sha256_folder, write_json

# What a bundle repeats of a run's facts, in the card's order of columns.
_STAGE_FACTS = ("stage", "steps", "seconds", "ranks", "loss_first", "loss_last")
# Settings that say where something is on this host, or hold addresses; they decide no result.
_LOCAL: dict[str, set[str] | bool] = {"data": {"root"}, "tracking": True, "cluster": True}
# Files of a from_pretrained folder that a reader needs.
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def write_bundle(
    config: Config,
    out: Path,
    *,
    licence: str,
    notes: Path | None = None,
    figures: Path | None = None,
    project: Path = Path(),
) -> dict[str, Any]:
    """Write a bundle.

    Args:
        config: settings of the finished project.
        out: folder to write; its name is the bundle's name. One that exists is replaced when all is there.
        licence: under which the weights are passed on.
        notes: text in Markdown for the card: intended use, limits.
        figures: fidelity.json to quote; None: that of these settings, if it was measured.
        project: the project's folder.

    Returns:
        The content of ``bundle.json``.

    Raises:
        UsageError: ``out`` exists and is no bundle.
        MagicDriveError: training is not finished, or a file is missing or has changed.
    """
    if out.exists() and not (out / BUNDLE).is_file():
        raise UsageError(f"{out} exists and is not a bundle, and would be replaced", "name another folder")
    paths = find_run_paths(config, project=project)
    run = paths.trained_model()
    encoders = read_json(project / "artifacts/encoders/encoders.json", "dvc repro encoders")
    if figures is None:
        figures = paths.generated.with_name(paths.generated.name.replace("generate", "fidelity")) / "fidelity.json"
    elif not figures.is_file():
        raise UsageError(f"{figures} is missing", "magicdrive fidelity measures it")
    tags, made = lineage_tags(config, project), read_json(run.result)
    with atomic_folder(out) as folder:
        for kind in (VAE, TEXT):
            _copy_encoder(project / encoders[kind]["path"], folder / kind)
        _store_factor(folder / VAE, encoders[VAE]["scaling_factor"])
        kept = {
            kind: encoders[kind]
            | {"path": kind, "digest": sha256_folder(folder / kind), "copied_from": encoders[kind]["digest"]}
            for kind in (VAE, TEXT)
        }
        _copy_network(run, folder / NETWORK, kept)
        facts = {
            "format": FORMAT,
            "name": out.name,
            "profile": config.profile,
            "stage": run.stage,
            "parameters": made.get("parameters"),
            "training": [_stage_facts(plan) for plan in paths.stages],
            "start": run.start and {"model": Path(run.start.name).name, "sha256": run.start.sha256},
            "encoders": kept,
            "commit": tags.get("git.commit"),
            "changed_since_commit": tags.get("git.dirty") == "true",
            "data": {"version": config.data.version} | made.get("inputs", {}),
            "settings": config.model_dump(mode="json", exclude=dict(_LOCAL)),
            "figures": read_json(figures) if figures.is_file() else {},
            "licence": licence,
            "notes": notes.read_text(encoding="utf-8") if notes else "",
        }
        (folder / CARD).write_text(_card(facts), encoding="utf-8")
        facts["files"] = {
            file.relative_to(folder).as_posix(): sha256_file(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        write_json(folder / BUNDLE, facts)
        verify_bundle(folder)
    return facts


def figure_lines(shipped: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Lay the figures of a bundle and of a new measurement side by side.

    Args:
        shipped: figures of the bundle, the content of fidelity.json.
        measured: figures of the measurement, in the same form.

    Returns:
        A line for each figure of the generated videos that either has: its name, both values, and the difference.
    """
    before, now = _generated(shipped), _generated(measured)
    names = list(dict.fromkeys([*before, *now]))
    width = max(map(len, names), default=0) + 2
    lines = [f"{'':{width}}{'bundle':>10}{'here':>10}{'difference':>12}"]
    for name in names:
        a, b = before.get(name), now.get(name)
        difference = "" if a is None or b is None else f"{b - a:+.3f}"
        lines.append(f"{name:{width}}{_number(a):>10}{_number(b):>10}{difference:>12}".rstrip())
    return lines


def _generated(figures: dict[str, Any]) -> dict[str, float | None]:
    """Return the figures of the generated videos by the words that lead to them."""
    found: dict[str, float | None] = {}
    for section, rows in figures.items():
        if not isinstance(rows, dict):
            continue
        for name, value in rows.get("generated", rows).items():  # other rows are bounds and controls
            if isinstance(value, dict):
                found |= {f"{section} {name} {column}": each for column, each in value.items()}
            elif value is None or isinstance(value, int | float):
                found[f"{section} {name}"] = value
    return found


def _copy_encoder(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise MagicDriveError(f"{source} is missing", "dvc repro encoders")
    target.mkdir()
    for pattern in _MODEL_FILES:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def _store_factor(folder: Path, factor: float) -> None:
    """Write the scaling factor into the VAE's own settings, where ``vae.scaling_factor: stored`` finds it."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"scaling_factor": factor})


def _copy_network(run: StagePlan, target: Path, encoders: dict[str, Any]) -> None:
    target.mkdir()
    shutil.copyfile(run.weights, target / "ema.safetensors")
    facts = read_json(run.result)
    if sha256_file(target / "ema.safetensors") != facts["weights_sha256"]:
        raise MagicDriveError(f"{run.weights} has changed since its run wrote it", "train the stage again")
    write_json(target / "run.json", facts | {"encoders": encoders})


def _stage_facts(plan: StagePlan) -> dict[str, Any]:
    facts = read_json(plan.result)
    return {name: facts.get(name) for name in _STAGE_FACTS}


def _card(facts: dict[str, Any]) -> str:
    """Return the model card, in Markdown."""
    commit = f"commit {facts['commit']}" if facts["commit"] else "no commit"
    if facts["changed_since_commit"]:
        commit += ", with changes that were not committed"
    encoders = facts["encoders"]
    start = facts["start"]
    lines = [
        f"# {facts['name']}",
        "",
        "A network for street-view videos, with the VAE and the text encoder that it was trained with.",
        "",
        f"- Licence of the weights: {facts['licence']}",
        f"- Recipe: profile `{facts['profile']}`, {commit}",
        f"- Network: {facts['stage']}, {facts['parameters'] or 'unknown number of'} parameters, EMA weights in fp32",
        f"- Start: {start['model'] + ', sha256 ' + start['sha256'] if start else 'initial weights'}",
        f"- VAE: {encoders[VAE]['latent_channels']} latent channels, scaling factor {encoders[VAE]['scaling_factor']}",
        f"- Text encoder: width {encoders[TEXT]['width']}",
        "",
        "## Training",
        "",
        *_table([name.replace("_", " ") for name in _STAGE_FACTS], [list(row.values()) for row in facts["training"]]),
        "",
        "## Data",
        "",
        *_table(["input", "digest"], list(facts["data"].items())),
        "",
    ]
    tables = {name: _figure_table(section) for name, section in facts["figures"].items()}
    if any(tables.values()):
        lines += [
            "## Figures",
            "",
            "Measured by `magicdrive fidelity` with the settings in `bundle.json`, on validation scenes.",
            "",
        ]
    for name, table in tables.items():
        lines += [f"{name.capitalize()}:", "", *table, ""] if table else []
    if facts["notes"]:
        lines += [facts["notes"].strip(), ""]
    return "\n".join(lines)


def _figure_table(section: Any) -> list[str]:
    """Return a section of fidelity.json as a table; empty for lists, such as the names of scenes."""
    if not isinstance(section, dict):
        return []
    rows = {name: row for name, row in section.items() if isinstance(row, dict)}
    if not rows:
        rows = {"": {name: value for name, value in section.items() if not isinstance(value, list)}}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        return []
    return _table(["", *columns], [[name, *(row.get(column) for column in columns)] for name, row in rows.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(_number(value) for value in row)} |" for row in rows),
    ]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
