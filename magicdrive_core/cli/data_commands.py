"""Verbs for looking at data, bringing it in and taking it out, beside those of ``cli.py``.

Everything heavy is imported inside its verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, INFOS, Params, Set, read_config, read_stage
from magicdrive_core.errors import MagicDriveError, UsageError

app = typer.Typer()


@app.command("import-infos")
def import_infos(
    train: Annotated[Path | None, typer.Option(metavar="PKL", help="Its scenes are for training.")] = None,
    val: Annotated[Path | None, typer.Option(metavar="PKL", help="Its scenes are for validation.")] = None,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Take the infos from published *_with_bid.pkl or track-2 files (data types only, anything else is refused)."""
    from magicdrive_core.data.infos import import_infos as bring_in

    files = {split: path for split, path in (("train", train), ("val", val)) if path is not None}
    if not files:
        raise UsageError("import-infos: name a file", "for example --val nuscenes_interp_12Hz_infos_val_with_bid.pkl")
    config = read_config(params, overrides)
    count = bring_in(files, Path(config.data.root), config.data.version, INFOS)
    print(f"{count} scenes in {INFOS}. So that DVC keeps them: dvc commit --force infos")


@app.command("export-infos")
def export_infos(
    out: Annotated[Path, typer.Argument(metavar="PKL", help="The file to write.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
) -> None:
    """Write the infos of a split in the published form, for programs that read it."""
    from magicdrive_core.data.infos import SUMMARY, read_scenes
    from magicdrive_core.data.published_infos import write_published
    from magicdrive_core.utils.files import read_json

    if split not in ("train", "val"):
        raise UsageError(f"--split {split}: write train or val")
    scenes = [scene for scene in read_scenes(INFOS) if scene.split in (split, "both")]
    if not scenes:
        raise MagicDriveError(f"{INFOS} has no scene of the split {split}", "see splits in its infos.json")
    write_published(scenes, out, read_json(INFOS / SUMMARY)["version"])
    print(f"{len(scenes)} scenes, {sum(map(len, scenes))} frames: {out}")


@app.command("preview-edits")
def preview_edits(
    scene: Annotated[str, typer.Option("--scene", help="Its name.")],
    edits: Annotated[
        Path | None, typer.Argument(metavar="YAML", help="Changes; without it the objects are listed.")
    ] = None,
    frame: Annotated[int, typer.Option(help="Of the scene, at 12 Hz.")] = 0,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("preview.png"),
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Draw what changes to a scene would tell the network (boxes and map in the views and from above)."""
    from magicdrive_core.data.edits import load_edits
    from magicdrive_core.data.infos import read_scenes
    from magicdrive_core.report.edit_preview import draw_preview, list_objects

    scenes = {found.name: found for found in read_scenes(INFOS)}
    if scene not in scenes:
        raise UsageError(f"there is no scene {scene!r}", f"known: {', '.join(list(scenes)[:10])}")
    chosen = scenes[scene]
    if not 0 <= frame < len(chosen):
        raise UsageError(f"--frame {frame}: {scene} has frames 0 to {len(chosen) - 1}")
    if edits is None:
        for token, name, frames, metres in list_objects(chosen):
            print(f"{token}  {name:20} {frames:4} frames, from {metres:5.1f} m")
        return
    draw_preview(read_config(params, overrides), chosen, load_edits(edits), frame, out)
    print(out)


@app.command("loader-bench")
def loader_bench(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or stage3.")],
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 20.0,
    ranks: Annotated[int, typer.Option(min=1, help="That share the micro-batches; the first one is measured.")] = 1,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Measure one rank's loader: clips a second, bytes held, and what the container's memory would allow."""
    from magicdrive_core.training.loader_bench import measure_loader

    kind = read_stage(stage)
    for line in measure_loader(read_config(params, overrides), kind, seconds=seconds, ranks=ranks).lines():
        print(line)
