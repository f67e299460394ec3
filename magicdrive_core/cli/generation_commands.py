"""Verbs for generation and for its plan of GPU memory."""

from __future__ import annotations

from typing import Annotated

import typer

from magicdrive_core.cli.options import (
    DEFAULT_PARAMS,
    Params,
    Set,
    read_config,
    read_frames,
    read_shard,
    read_size,
)

app = typer.Typer()


@app.command()
def generate(
    params: Params = DEFAULT_PARAMS,
    overrides: Set = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Work as the I-th of N workers that share the clips.")
    ] = "1/1",
) -> None:
    """Generate the validation clips. The network is the last trained stage or generate.weights; finished clips stay.

    Example: magicdrive generate --shard 2/8
    """
    from magicdrive_core.inference.worker import run_worker

    print(run_worker(read_config(params, overrides), read_shard(shard)))


@app.command()
def memory(
    size: Annotated[str | None, typer.Option(help="One size instead of the published table's, e.g. 848x1600.")] = None,
    frames: Annotated[int, typer.Option(help="Frames of a clip of that size.")] = 17,
    sp: Annotated[int, typer.Option(help="Devices that share a clip's tokens (with --size).")] = 1,
    boxes: Annotated[int, typer.Option(help="Boxes of a clip.")] = 100,
    offload: Annotated[bool, typer.Option(help="Keep the model that is not at work in main memory.")] = True,
    slice_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that a block works on at a time; 0: all of them.")
    ] = 65536,
    stripe_rows: Annotated[
        int, typer.Option(metavar="N", help="Latent rows that the VAE decodes at a time; 0: whole pictures.")
    ] = 32,
) -> None:
    """Plan the GPU memory of generation. It needs no GPU; the network is the XL network.

    Example: magicdrive memory --size 848x1600 --frames 17
    """
    from dataclasses import replace

    from magicdrive_core.inference.memory_plan import Planner, Setting, cell_lines, table_lines

    setting = Setting(
        slots=boxes,
        sp=sp,
        offload=offload,
        slice_tokens=slice_tokens,
        stripe_rows=stripe_rows or None,
    )
    planner = Planner()
    if size is None:
        lines = table_lines(planner, replace(setting, sp=1))
    else:
        lines = cell_lines(planner, read_size(size), read_frames(frames), setting)
    for line in lines:
        print(line, flush=True)
