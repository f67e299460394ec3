"""The published system's table of GPU memory, and what is planned here beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from magicdrive_core.inference.memory import Peaks, Planner, Setting

GIB = 1 << 30
SP_SIZES = (1, 2, 4, 8)
FULL = 241  # frames of a whole scene

# GiB by (size, frames): encoding of the conditions and sampling with CPU offload, at each of SP_SIZES; then decoding.
# Measured figures of the published system on a GPU of 96 GB: its FAQ, question 2.1. None: out of memory.
PUBLISHED: dict[tuple[str, int], tuple[tuple[float | None, ...], float]] = {
    ("224x400", 17): ((17.91, 17.91, 17.91, 17.91), 3.87),
    ("224x400", FULL): ((21.93, 18.51, 18.51, 18.51), 4.82),
    ("424x800", 17): ((17.97, 17.97, 17.97, 17.97), 12.43),
    ("424x800", FULL): ((40.69, 25.70, 19.80, 19.80), 16.24),
    ("848x1600", 17): ((18.08, 18.08, 18.08, 18.08), 51.33),
    ("848x1600", 33): ((24.89, 18.33, 18.33, 18.33), 52.08),
    ("848x1600", 65): ((43.62, 26.67, 18.83, 18.83), 53.59),
    ("848x1600", 129): ((81.14, 48.24, 29.66, 23.83), 56.84),
    ("848x1600", FULL): ((None, 83.40, 50.19, 39.76), 58.20),
}


def table_lines(planner: Planner, setting: Setting) -> Iterator[str]:
    """The table, each cell as "planned / published" in GiB, line by line as it is planned."""
    yield "GiB, planned / published (its FAQ, question 2.1). Text features come from their cache: no T5 here."
    heads = ["no sp", *(f"sp={sp}" for sp in SP_SIZES[1:]), "decoding"]
    yield f"{'clip':14}" + "".join(f"{head:>16}" for head in heads)
    for (size, frames), (sampling, decoding) in PUBLISHED.items():
        peaks = [planner.peaks(size, frames, replace(setting, sp=sp)) for sp in SP_SIZES]
        cells = [_cell(_sampling(mine), theirs) for mine, theirs in zip(peaks, sampling, strict=True)]
        yield f"{size} {frames:4} " + "".join(f"{cell:>16}" for cell in [*cells, _cell(peaks[0].decoding, decoding)])


def cell_lines(planner: Planner, size: str, frames: int, setting: Setting) -> Iterator[str]:
    """One clip, phase by phase."""
    peaks = planner.peaks(size, frames, setting)
    for name in ("encoding", "sampling", "decoding"):
        yield f"{name:10} {getattr(peaks, name) / GIB:7.2f} GiB"


def _sampling(peaks: Peaks) -> int:
    return max(peaks.encoding, peaks.sampling)


def _cell(planned: int, published: float | None) -> str:
    return f"{planned / GIB:.2f} / {'> 96' if published is None else f'{published:.2f}'}"
