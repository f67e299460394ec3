"""Verbs for training."""

from __future__ import annotations

from typing import Annotated

import typer

from magicdrive_core.cli.options import DEFAULT_PARAMS, Params, Set, read_config, read_stage

app = typer.Typer()


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or stage3.")],
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings and print what would be started or submitted.")
    ] = False,
) -> None:
    """Train one stage where the section cluster says. To train all stages: python -m flows.train.

    Example: magicdrive train stage1 -S training.stage1.steps=50
    """
    from magicdrive_core.training.supervise import show_launch, train_stage

    if dry_run:
        print(show_launch(params, overrides, read_stage(stage)), end="")
        return
    result = train_stage(params, overrides, read_stage(stage), None)
    print(f"{stage} {'was finished before' if result.skipped else 'finished'}: {result.weights}")


@app.command("loader-bench")
def loader_bench(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or stage3.")],
    seconds: Annotated[float, typer.Option(help="Time to measure.")] = 20.0,
    ranks: Annotated[
        int, typer.Option(min=1, help="Ranks that share the micro-batches; the first one is measured.")
    ] = 1,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Measure one rank's loader. It prints clips per second, memory held and what the container's memory allows.

    Example: magicdrive loader-bench stage3 --ranks 8
    """
    from magicdrive_core.training.loader_speed import measure_loader

    kind = read_stage(stage)
    for line in measure_loader(read_config(params, overrides), kind, seconds=seconds, ranks=ranks).lines():
        print(line)


@app.command("train-memory")
def train_memory(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or stage3.")],
    device: Annotated[
        float, typer.Option(metavar="GB", min=1, help="Memory of a device, in units of 10^9 bytes.")
    ] = 80.0,
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
) -> None:
    """Plan the device memory of a stage's training, bucket by bucket. It needs no device and no data.

    Example: magicdrive train-memory stage3 --device 80 --params profiles/nuscenes.yaml -S cluster.ranks=8
    """
    from magicdrive_core.training.memory_plan import table_lines

    for line in table_lines(read_config(params, overrides), read_stage(stage), device * 1e9):
        print(line, flush=True)
