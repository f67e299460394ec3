"""The command line: one verb for each piece of work. DVC stages and Prefect tasks run the same verbs.

Everything heavy is imported inside its verb, so that ``magicdrive --help`` answers at once.
Exit codes: 1 the work failed, 2 wrong command line or params.yaml, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from magicdrive_core.cli import data_commands as cli_data
from magicdrive_core.cli import fidelity_commands as cli_measure
from magicdrive_core.cli import score_commands as cli_scores
from magicdrive_core.cli import video_commands as cli_video
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
    read_stage,
)
from magicdrive_core.errors import ERROR_NOTE, MagicDriveError, UsageError, report_error
from magicdrive_core.utils.offline import stay_silent

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Config
    from magicdrive_core.wcoda.submission import Expected

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(cli_data.app)
app.add_typer(cli_measure.app)
app.add_typer(cli_scores.app)
app.add_typer(cli_video.app, name="video")

_debug = False


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """MagicDrive: street-view video diffusion on nuScenes, from data to a benchmark package."""
    global _debug
    _debug = debug


@app.command()
def use(
    profile: Annotated[str, typer.Argument(help="A file of profiles/, without .yaml: demo, mini, nuscenes.")],
    overrides: Set = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a params.yaml that was changed by hand.")] = False,
) -> None:
    """Write params.yaml from a profile."""
    from magicdrive_core.config.profiles import use_profile

    use_profile(profile, overrides or [], force=force)


@app.command()
def synth(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    render_for: Annotated[
        Path | None, typer.Option("--render-for", metavar="ROOT", help="Draw the pictures that this data root lacks.")
    ] = None,
    version: Annotated[str, typer.Option("--version", help="Its table folder (with --render-for).")] = "v1.0-mini",
) -> None:
    """Make the generated data set, or draw the missing pictures of another one."""
    if render_for is not None:
        from magicdrive_core.synthetic.render import render_missing

        print(f"{render_missing(render_for, version)} pictures drawn below {render_for}")
        return
    from magicdrive_core.synthetic.dataset import synthesize

    config = read_config(params, overrides)
    if config.synth is None:
        raise UsageError(f"{params}: synth is null, the data is your own", "magicdrive use demo")
    synthesize(config.synth, Path(config.data.root), config.data.version)


@app.command()
def infos(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out scenes with broken records, maps or pictures, and list them.")
    ] = False,
) -> None:
    """DVC stage: scenes at 12 Hz from the data set's tables."""
    from magicdrive_core.data.infos import build_infos

    build_infos(read_config(params, [*(overrides or []), *(["data.skip_bad=true"] if skip_bad else [])]), INFOS)


@app.command()
def conditions(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: BEV maps and the list of clips."""
    from magicdrive_core.data.conditions import build_conditions

    build_conditions(read_config(params, overrides), INFOS, CONDITIONS)


@app.command()
def encoders(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: train the small VAE and make the small T5, or check the ones that the profile names."""
    from magicdrive_core.encoders.build_encoders import build_encoders

    build_encoders(read_config(params, overrides), INFOS, ENCODERS)


@app.command()
def text(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: T5 features of all captions and class names."""
    from magicdrive_core.encoders.caches import write_text_cache

    write_text_cache(read_config(params, overrides), INFOS, ENCODERS, TEXT)


@app.command()
def latents(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """DVC stage: VAE moments of all clips that are trained on."""
    from magicdrive_core.encoders.caches import write_latent_cache

    write_latent_cache(read_config(params, overrides), INFOS, ENCODERS, LATENTS)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or stage3.")],
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings and print what would be started or submitted.")
    ] = False,
) -> None:
    """Train one stage where the cluster section says (python -m flows.train: all of them, with Prefect)."""
    from magicdrive_core.training.supervise import show_launch, train_stage

    if dry_run:
        print(show_launch(params, overrides, read_stage(stage)), end="")
        return
    result = train_stage(params, overrides, read_stage(stage), None)
    print(f"{stage} {'was done already' if result.skipped else 'done'}: {result.weights}")


@app.command()
def generate(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Work as the I-th of N workers that share the clips.")
    ] = "1/1",
) -> None:
    """Generate the validation clips with the last trained stage, or with generate.weights; what is done is skipped."""
    from magicdrive_core.data.infos import read_scenes
    from magicdrive_core.experiment.run_paths import find_run_paths
    from magicdrive_core.inference.items import list_items

    share, shares = _shard(shard)
    config = read_config(params, overrides)
    paths = find_run_paths(config)
    if not paths.model.done:
        raise MagicDriveError(f"{paths.model.folder} holds no finished training", "python -m flows.train")
    if config.generate.devices > 1:
        from magicdrive_core.inference.worker import generate_in_group

        generate_in_group(config, paths.model.folder, paths.generated, (share - 1, shares))
        print(f"done: {paths.generated}")
        return
    from magicdrive_core.device import take_device
    from magicdrive_core.inference.generate import generate_items

    take_device(share - 1, share=True)  # the workers of one host take turns at its devices
    items = list_items(config, read_scenes(INFOS))
    summary = generate_items(config, items, paths.model.folder, paths.generated, shard=(share - 1, shares))
    print(f"{len(summary.made)} made, {len(summary.skipped)} done before: {paths.generated}")


@app.command()
def package(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """Put the generated videos into a W-CODA results.zip, and check it."""
    from magicdrive_core.experiment.run_paths import find_run_paths
    from magicdrive_core.tracking.lineage import lineage_tags
    from magicdrive_core.wcoda.package import pack
    from magicdrive_core.wcoda.validator import judge

    config = read_config(params, overrides)
    paths = find_run_paths(config)
    made = pack(config, paths.generated, paths.submission, lineage_tags(config) | paths.model_tags(config))
    _refuse(made.zip_path, judge(made.zip_path, _expected(config)))


@app.command()
def validate(
    archive: Annotated[Path, typer.Argument(metavar="ZIP", help="A results.zip.")],
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Check any W-CODA results.zip: every name, every count, every frame of every video."""
    from magicdrive_core.wcoda.validator import validate as find_faults

    _refuse(archive, find_faults(archive, _expected(read_config(params, overrides))))


@app.command()
def report(params: Params = DEFAULT_PARAMS, overrides: Set = None) -> None:
    """Write report.html: what was generated, from what, the losses, and the package where there is one."""
    from datetime import datetime

    from magicdrive_core.evaluation.score_sheet import SHEET, Sheet
    from magicdrive_core.experiment.run_paths import find_run_paths
    from magicdrive_core.report.page import write_report
    from magicdrive_core.tracking.lineage import lineage_tags
    from magicdrive_core.tracking.runs import log_submission
    from magicdrive_core.wcoda.package import MANIFEST, ZIP, read_package
    from magicdrive_core.wcoda.validator import VERDICT, judge

    config = read_config(params, overrides)
    paths = find_run_paths(config)
    sheet = Sheet.read(paths.submission) if (paths.submission / SHEET).is_file() else None
    packed = read_package(paths.submission) if (paths.submission / ZIP).is_file() else None
    lineage = lineage_tags(config) | paths.model_tags(config)
    page = write_report(
        config,
        paths.generated,
        paths.submission,
        runs={plan.stage: plan.folder for plan in paths.stages},
        package=packed,
        faults=judge(packed.zip_path, _expected(config)) if packed else (),
        notes=paths.notes,
        lineage=lineage,
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        sheet=sheet if packed and sheet and sheet.package == packed.sha256 else None,
    )
    files = [page, paths.submission / SHEET, paths.submission / MANIFEST, paths.submission / VERDICT]
    log_submission(config, paths.submission, sheet.figures if sheet else {}, files, lineage)
    print(page)


@app.command()
def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="PATH", help="ema.pt, a safetensors file, or a folder of shards with its index.")
    ],
    stage: Annotated[str, typer.Option(help="Whose network it is: stage1, stage2 or stage3.")] = "stage3",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to put it; runs/published-<stage> by default.")
    ] = None,
) -> None:
    """Take over the released XL weights: every name and shape checked, written as safetensors."""
    from magicdrive_core.model.published.checkpoint import import_checkpoint as take_over
    from magicdrive_core.model.published.checkpoint import published_xl

    kind = read_stage(stage)
    folder = out or Path(f"runs/published-{kind}")
    count = take_over(checkpoint, folder, kind, published_xl(kind))
    print(f"{count} tensors: {folder / 'ema.safetensors'}")
    print(f"to generate with them: magicdrive use nuscenes -S published=true -S generate.weights={folder}")


@app.command()
def memory(
    size: Annotated[str | None, typer.Option(help="One size instead of the published table's, e.g. 848x1600.")] = None,
    frames: Annotated[int, typer.Option(help="Of that clip.")] = 17,
    sp: Annotated[int, typer.Option(help="Devices that share a clip's tokens (with --size).")] = 1,
    boxes: Annotated[int, typer.Option(help="Boxes of a clip.")] = 100,
    offload: Annotated[bool, typer.Option(help="The model that is not at work waits in main memory.")] = True,
    slice_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that a block works on at a time; 0: all of them.")
    ] = 65536,
    stripe_rows: Annotated[
        int, typer.Option(metavar="N", help="Rows of a stripe in which the VAE decodes; 0: whole pictures.")
    ] = 32,
) -> None:
    """Plan the GPU memory of generation with the XL network, without a GPU."""
    from dataclasses import replace

    from magicdrive_core.inference.memory_plan import Planner, Setting, cell_lines, table_lines

    setting = Setting(
        slots=boxes,
        sp=sp,
        offload=offload,
        slice_tokens=slice_tokens or None,
        stripe_rows=stripe_rows or None,
    )
    planner = Planner()
    if size is None:
        lines = table_lines(planner, replace(setting, sp=1))
    else:
        lines = cell_lines(planner, _size(size), _frames(frames), setting)
    for line in lines:
        print(line, flush=True)


@app.command()
def golden(files: Annotated[list[Path], typer.Argument(help="golden_model_*.npz files.")]) -> None:
    """Compare the network with reference cases of the published one, intermediate by intermediate."""
    from magicdrive_core.model.published.golden import TOLERANCE, check_golden

    far = []
    cases = [file for file in files if not file.name.endswith("_weights.npz")]  # a shell's * names those too
    for file in cases or files:
        result = check_golden(file)
        for name, difference in result.rows:
            print(f"{file.name}  {name:40} {difference:.1e}")
        if not result.agrees:
            far.append(file.name)
    if far:
        raise MagicDriveError(
            f"{', '.join(far)}: further than {TOLERANCE:g} from the reference", "its rows stand above"
        )


def _expected(config: Config) -> Expected:
    from magicdrive_core.wcoda.submission import Expected

    return Expected(
        generations=config.generate.generations,
        long_scenes=config.submission.long_scenes,
        frames=config.submission.frames,
        fps=config.video.fps,
        max_mbit_s=config.video.max_mbit_s,
    )


def _refuse(archive: Path, faults: list[str]) -> None:
    for fault in faults:
        print(fault)
    if faults:
        raise MagicDriveError(f"{archive} is not a valid submission: {len(faults)} fault(s)", "they stand above")
    print(f"{archive} is valid")


def _size(text: str) -> str:
    from magicdrive_core.config.schema import parse_size

    try:
        parse_size(text)
    except ValueError as error:
        raise UsageError(f"--size {text}: {error}") from None
    return text


def _frames(count: int) -> int:
    from magicdrive_core.config.schema import check_frames

    try:
        return check_frames(count)
    except ValueError as error:
        raise UsageError(f"--frames {count}: {error}") from None


def _shard(text: str) -> tuple[int, int]:
    share, slash, shares = text.partition("/")
    if not (slash and share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares)):
        raise UsageError(f"--shard {text}: write I/N with 1 <= I <= N", "for example --shard 2/8")
    return int(share), int(shares)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits; what a user can mend is one line and a hint on stderr."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written files are cleaned up
    stay_silent()
    try:
        app(arguments)
    except (MagicDriveError, OSError) as error:
        if _debug:
            raise
        sys.exit(_explain(error))
    sys.exit(0)


def _explain(error: MagicDriveError | OSError) -> int:
    """Prints the error, leaves it for the process that started this one, and returns the exit code."""
    told = report_error(error, "magicdrive --debug shows where")
    if ERROR_NOTE in os.environ:
        from magicdrive_core.utils.files import write_json

        with suppress(MagicDriveError, OSError):  # where the disk is full, the lines above must do
            write_json(os.environ[ERROR_NOTE], [told.message, told.hint, told.exit_code])
    return told.exit_code
