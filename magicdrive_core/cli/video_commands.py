"""Verbs for video files: ``magicdrive video``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicdrive_core.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Encode videos.")


@app.callback()
def _group() -> None:
    """Keep the verb's name, which typer drops from a group of one verb."""


@app.command("from-frames")
def from_frames(
    folder: Annotated[Path, typer.Argument(help="PNG frames of one size, ordered by the numbers in their names.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.mp4", help="File to write.")],
    max_mbit_s: Annotated[
        float, typer.Option(min=0, help="Largest average bit rate of the file; 0: the encoder decides.")
    ] = 4.0,
    fps: Annotated[int, typer.Option(min=1, help="Frames per second.")] = 12,
    head: Annotated[int, typer.Option(min=0, metavar="N", help="Leave out the first N frames.")] = 0,
    tail: Annotated[int, typer.Option(min=0, metavar="N", help="Leave out the last N frames.")] = 0,
) -> None:
    """Encode a folder of PNG frames as mp4. The written file keeps the limit of the bit rate.

    Example: magicdrive video from-frames frames/ video.mp4 --max-mbit-s 4
    """
    from magicdrive_core.video.encoder import encode_video
    from magicdrive_core.video.frames import frame_files, read_frame

    if out.suffix != ".mp4":
        raise UsageError(f"{out} does not end with .mp4", "for example video.mp4")
    files = frame_files(folder)
    kept = files[head : len(files) - tail]
    if not kept:
        raise UsageError(f"{folder} holds {len(files)} frames: --head {head} and --tail {tail} leave none")
    made = encode_video(map(read_frame, kept), out, fps=fps, max_mbit_s=max_mbit_s or None)
    print(f"{out}: {made.frames} frames, {made.mbit_s:.2f} Mbit/s, {made.psnr:.1f} dB")
