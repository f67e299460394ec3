"""Verbs for data: the generated data set, the DVC stages, infos in and out, previews of edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.cli.options import (
    CONDITIONS,
    DEFAULT_PARAMS,
    ENCODERS,
    INFOS,
    LATENTS,
    TEXT,
    Params,
    Set,
    read_config,
)
from magicdrive_core.errors import UsageError

app = typer.Typer()


@app.command()
def synth(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    render_for: Annotated[
        Path | None, typer.Option("--render-for", metavar="ROOT", help="Draw the pictures that are missing below ROOT.")
    ] = None,
    version: Annotated[str, typer.Option("--version", help="Table folder of ROOT (with --render-for).")] = "v1.0-mini",
) -> None:
    """Make the generated data set. With --render-for: draw the missing pictures of another one.

    Example: magicdrive synth --params profiles/demo.yaml
    """
    if render_for is not None:
        from magicdrive_core.synthetic.render import render_missing

        print(f"{render_missing(render_for, version)} pictures drawn below {render_for}")
        return
    from magicdrive_core.synthetic.dataset import synthesize

    config = read_config(params, overrides)
    if config.synth is None:
        raise UsageError(f"{params}: synth is null, so nothing is generated", "magicdrive use demo")
    synthesize(config.synth, Path(config.data.root), config.data.version)


@app.command()
def infos(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out scenes with broken records, maps or pictures, and list them.")
    ] = False,
) -> None:
    """DVC stage: write the data set's scenes at 12 Hz.

    Example: magicdrive infos --skip-bad
    """
    from magicdrive_core.data.infos import build_infos

    build_infos(read_config(params, [*(overrides or []), *(["data.skip_bad=true"] if skip_bad else [])]), INFOS)


@app.command()
def conditions(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: draw BEV maps and list the clips.

    Example: magicdrive conditions -S conditions.maps=live
    """
    from magicdrive_core.data.conditions import build_conditions

    build_conditions(read_config(params, overrides), INFOS, CONDITIONS)


@app.command()
def encoders(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: make the VAE and the text encoder. Encoders that the settings name are checked instead.

    Example: magicdrive encoders -S vae.build.steps=500
    """
    from magicdrive_core.encoders.build_encoders import build_encoders

    build_encoders(read_config(params, overrides), INFOS, ENCODERS)


@app.command()
def text(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: encode all captions and class names with T5.

    Example: magicdrive text -S text.max_tokens=64
    """
    from magicdrive_core.encoders.caches import write_text_cache

    write_text_cache(read_config(params, overrides), INFOS, ENCODERS, TEXT)


@app.command()
def latents(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: encode all training clips with the VAE.

    Example: magicdrive latents -S latents.dtype=float32
    """
    from magicdrive_core.encoders.caches import write_latent_cache

    write_latent_cache(read_config(params, overrides), INFOS, ENCODERS, LATENTS)


@app.command("import-infos")
def import_infos(
    train: Annotated[Path | None, typer.Option(metavar="PKL", help="File whose scenes are for training.")] = None,
    val: Annotated[Path | None, typer.Option(metavar="PKL", help="File whose scenes are for validation.")] = None,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Import infos from published *_with_bid.pkl or track-2 files.

    The files are pickles: plain data is read, anything else is refused.

    Example: magicdrive import-infos --val nuscenes_interp_12Hz_infos_val_with_bid.pkl
    """
    from magicdrive_core.data.infos import import_infos as write_imported

    files = {split: path for split, path in (("train", train), ("val", val)) if path is not None}
    if not files:
        raise UsageError("import-infos needs a file", "for example --val nuscenes_interp_12Hz_infos_val_with_bid.pkl")
    config = read_config(params, overrides)
    count = write_imported(files, Path(config.data.root), config.data.version, INFOS)
    print(f"{count} scenes in {INFOS}; next, so that DVC keeps them: dvc commit --force infos")


@app.command("export-infos")
def export_infos(
    out: Annotated[Path, typer.Argument(metavar="PKL", help="The file to write.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "val",
) -> None:
    """Write the infos of a split in the published form. Programs that read published infos take it.

    Example: magicdrive export-infos infos_val.pkl --split val
    """
    from magicdrive_core.data.infos import export_infos as write_exported

    if split not in ("train", "val"):
        raise UsageError(f"--split {split}: write train or val")
    scenes = write_exported(INFOS, split, out)
    print(f"{len(scenes)} scenes, {sum(map(len, scenes))} frames: {out}")


@app.command("preview-edits")
def preview_edits(
    scene: Annotated[str, typer.Option("--scene", help="Name of the scene.")],
    edits: Annotated[
        Path | None, typer.Argument(metavar="YAML", help="File of edits; without it, list the scene's objects.")
    ] = None,
    frame: Annotated[int, typer.Option(help="Number of the frame in the scene, at 12 Hz.")] = 0,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("preview.png"),
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Draw the conditions of an edited scene. It shows boxes and map in the views and from above.

    Example: magicdrive preview-edits edits.yaml --scene demo-2001 --out preview.png
    """
    from magicdrive_core.data.edits import load_edits
    from magicdrive_core.data.infos import find_scene
    from magicdrive_core.report.edit_preview import draw_preview, list_objects

    chosen = find_scene(INFOS, scene)
    if not 0 <= frame < len(chosen):
        raise UsageError(f"--frame {frame}: {scene} has frames 0 to {len(chosen) - 1}")
    if edits is None:
        for token, name, frames, metres in list_objects(chosen):
            print(f"{token}  {name:20} {frames:4} frames, from {metres:5.1f} m")
        return
    draw_preview(read_config(params, overrides), chosen, load_edits(edits), frame, out)
    print(out)
