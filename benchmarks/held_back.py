"""Errors of interpolated objects against held-back annotations: every second key frame, by class.

    python benchmarks/held_back.py ../shared/data/nuscenes-drive v1.0-drive
    python benchmarks/held_back.py /path/to/nuscenes v1.0-mini

The neighbours of a held-back key frame are one second apart, twice the gap that the infos interpolate: these errors are
an upper bound for those of the infos.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from magicdrive_core.data.nuscenes_scenes import read_objects
from magicdrive_core.data.nuscenes_tables import Record, Tables, load_tables
from magicdrive_core.data.records import CLASSES
from magicdrive_core.data.timeline import Objects, extrapolate, interpolate

PAIRED, UNPAIRED = "both", "one"  # neighbouring key frames that hold the object


@dataclass(frozen=True)
class Errors:
    """Errors of the objects of one class (or of all) that both or only one of the neighbouring key frames hold."""

    kind: str  # PAIRED or UNPAIRED
    name: str  # of CLASSES, or "all"
    metres: NDArray[np.float64]  # distance of the centres
    degrees: NDArray[np.float64]  # angle of the rotation between the two orientations

    @property
    def count(self) -> int:
        """Number of compared objects."""
        return len(self.metres)


@dataclass(frozen=True)
class HeldBack:
    """Errors of interpolation over a data set."""

    errors: list[Errors]  # by kind and class, "all" last; classes without an object are left out
    annotated: int  # objects at held-back key frames
    invented: int  # interpolated or extrapolated objects that the held-back key frame does not hold


def held_back(tables: Tables, scenes: Iterable[Record] | None = None) -> HeldBack:
    """Compare interpolated with annotated objects at every second key frame.

    Args:
        tables: tables of the data root.
        scenes: records of scenes, by default all.

    Raises:
        MagicDriveError: a record is missing or impossible.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    annotated = invented = 0
    for scene in tables.scene if scenes is None else scenes:
        records = tables.of_scene(scene)
        samples = records.samples()
        keys = [read_objects(records, sample) for sample in samples]
        times = [sample["timestamp"] for sample in samples]
        annotated += sum(len(truth.ids) for truth in keys[1:-1:2])
        for kind, estimate, truth in _estimates(keys, times):
            rows = {token: row for row, token in enumerate(truth.ids)}
            invented += sum(token not in rows for token in estimate.ids)
            known = [row for row, token in enumerate(estimate.ids) if token in rows]
            estimate, truth = estimate.pick(known), truth.pick([rows[estimate.ids[row]] for row in known])
            metres = np.linalg.norm(estimate.centres - truth.centres, axis=1)
            for name, *error in zip(truth.names, metres, angles(estimate.rotations, truth.rotations), strict=True):
                for group in (name, "all"):
                    found.setdefault((kind, group), []).append((float(error[0]), float(error[1])))
    errors = [
        Errors(kind, name, *np.array(found[kind, name]).T)
        for kind in (PAIRED, UNPAIRED)
        for name in (*CLASSES, "all")
        if (kind, name) in found
    ]
    return HeldBack(errors, annotated, invented)


def angles(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the angles (N,) in degrees between orientations, given as quaternions (N, 4)."""
    a, b = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in (first, second))
    near, far = np.linalg.norm(a - b, axis=1), np.linalg.norm(a + b, axis=1)
    return np.degrees(4 * np.arctan2(np.minimum(near, far), np.maximum(near, far)))


def _estimates(keys: Sequence[Objects], times: Sequence[int]) -> Iterator[tuple[str, Objects, Objects]]:
    """Yield kind, estimated objects and annotated objects at each held-back key frame."""
    for held in range(1, len(keys) - 1, 2):
        start, end, truth = keys[held - 1], keys[held + 1], keys[held]
        before, after = times[held] - times[held - 1], times[held + 1] - times[held]
        yield PAIRED, next(interpolate(start, end, np.array([before / (before + after)]))), truth
        earlier, later = max(0, held - 3), min(len(keys) - 1, held + 3)
        step = before / max(1, times[held - 1] - times[earlier])
        yield UNPAIRED, extrapolate(start, end, keys[earlier] if held >= 3 else None, step), truth
        step = after / max(1, times[later] - times[held + 1])
        yield UNPAIRED, extrapolate(end, start, keys[later] if held + 3 < len(keys) else None, step), truth


def main() -> None:
    """Print one row for each class: median, mean and 95th percentile in metres and degrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("version")
    arguments = parser.parse_args()
    result = held_back(load_tables(arguments.root, arguments.version))
    table = Table(
        "held by key frames", "class", "objects", "m median", "mean", "95 %", "degrees median", "mean", "95 %"
    )
    for errors in result.errors:
        figures = [
            f"{figure:.{digits}f}"
            for values, digits in ((errors.metres, 3), (errors.degrees, 2))
            for figure in (np.median(values), values.mean(), np.quantile(values, 0.95))
        ]
        table.add_row(errors.kind, errors.name, str(errors.count), *figures)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{result.annotated} annotated at held-back key frames, {result.invented} estimated but not annotated"
    )


if __name__ == "__main__":
    main()
