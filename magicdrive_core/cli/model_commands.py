"""Verbs for released weights and for the comparison with the published network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.cli.options import read_stage
from magicdrive_core.errors import MagicDriveError

app = typer.Typer()

GOLDEN_CASES = Path("tests/golden")  # in the project's folder


@app.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="PATH", help="ema.pt, a safetensors file, or a folder of shards with its index.")
    ],
    stage: Annotated[str, typer.Option(help="Stage of the network: stage1, stage2 or stage3.")] = "stage3",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write; default: runs/published-<stage>.")
    ] = None,
) -> None:
    """Import the released XL weights. Every name and shape is checked; the result is a safetensors file.

    Example: magicdrive import-checkpoint ema.pt --stage stage3
    """
    from magicdrive_core.model.published.checkpoint import import_checkpoint as write_imported
    from magicdrive_core.model.published.checkpoint import published_xl

    kind = read_stage(stage)
    folder = out or Path(f"runs/published-{kind}")
    count = write_imported(checkpoint, folder, kind, published_xl(kind))
    print(f"{count} tensors: {folder / 'ema.safetensors'}")
    print(f"to generate with them: magicdrive use nuscenes -S published=true -S generate.weights={folder}")


@app.command()
def golden(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files golden_model_*.npz; default: those of tests/golden.")
    ] = None,
) -> None:
    """Compare the network with published reference cases. Every intermediate result that they hold is compared.

    Example: magicdrive golden
    """
    from magicdrive_core.model.published.golden import TOLERANCE, check_golden

    files = files or sorted(GOLDEN_CASES.glob("golden_model_*.npz"))
    if not files:
        raise MagicDriveError(
            f"{GOLDEN_CASES} holds no golden_model_*.npz", "run this in the project's folder, or name the files"
        )
    far = []
    cases = [file for file in files if not file.name.endswith("_weights.npz")]  # a shell's * matches those too
    for file in cases or files:
        result = check_golden(file)
        for name, difference in result.rows:
            print(f"{file.name}  {name:40} {difference:.1e}")
        if not result.agrees:
            far.append(file.name)
    if far:
        raise MagicDriveError(
            f"{', '.join(far)}: differs from the reference by more than {TOLERANCE:g}", "see the lines above"
        )
