"""How far interpolated objects are from annotations that were held back: every second key frame, class by class.

    python benchmarks/held_back.py ../shared/data/nuscenes-drive v1.0-drive
    python benchmarks/held_back.py /path/to/nuscenes v1.0-mini

A held-back key frame lies between two others a second apart, twice the gap that the infos bridge: the errors here are
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

PAIRED, CARRIED = "in both", "in one"


@dataclass(frozen=True)
class Errors:
    """The objects of one class (or of all) at held-back key frames, seen in both key frames around or in one."""

    kind: str  # PAIRED or CARRIED
    name: str  # of CLASSES, or "all"
    metres: NDArray[np.float64]  # distance of the centres
    degrees: NDArray[np.float64]  # angle of the rotation between the two orientations

    @property
    def count(self) -> int:
        """Objects that were compared."""
        return len(self.metres)


@dataclass(frozen=True)
class HeldBack:
    """What a data set says about its own interpolation."""

    errors: list[Errors]  # by kind and class, "all" last; classes without an object are left out
    annotated: int  # objects at held-back key frames
    invented: int  # interpolated or carried objects that the held-back key frame does not hold


def held_back(tables: Tables, scenes: Iterable[Record] | None = None) -> HeldBack:
    """Compares at every second key frame of scenes (all of them where left out).

    Raises:
        MagicDriveError: a record is missing or impossible.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    annotated = invented = 0
    for scene in tables.scene if scenes is None else scenes:
        samples = tables.samples(scene)
        keys = [read_objects(tables, sample) for sample in samples]
        times = [sample["timestamp"] for sample in samples]
        annotated += sum(len(truth.ids) for truth in keys[1:-1:2])
        for kind, guess, truth in _guesses(keys, times):
            rows = {token: row for row, token in enumerate(truth.ids)}
            invented += sum(token not in rows for token in guess.ids)
            known = [row for row, token in enumerate(guess.ids) if token in rows]
            guess, truth = guess.pick(known), truth.pick([rows[guess.ids[row]] for row in known])
            metres = np.linalg.norm(guess.centres - truth.centres, axis=1)
            for name, *error in zip(truth.names, metres, angles(guess.rotations, truth.rotations), strict=True):
                for group in (name, "all"):
                    found.setdefault((kind, group), []).append((float(error[0]), float(error[1])))
    errors = [
        Errors(kind, name, *np.array(found[kind, name]).T)
        for kind in (PAIRED, CARRIED)
        for name in (*CLASSES, "all")
        if (kind, name) in found
    ]
    return HeldBack(errors, annotated, invented)


def angles(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The angle in degrees between orientations (N, 4), quaternions (w, x, y, z): (N)."""
    a, b = (q / np.linalg.norm(q, axis=1, keepdims=True) for q in (first, second))
    near, far = np.linalg.norm(a - b, axis=1), np.linalg.norm(a + b, axis=1)
    return np.degrees(4 * np.arctan2(np.minimum(near, far), np.maximum(near, far)))


def _guesses(keys: Sequence[Objects], times: Sequence[int]) -> Iterator[tuple[str, Objects, Objects]]:
    """(kind, guessed objects, annotated ones) at each held-back key frame."""
    for held in range(1, len(keys) - 1, 2):
        start, end, truth = keys[held - 1], keys[held + 1], keys[held]
        before, after = times[held] - times[held - 1], times[held + 1] - times[held]
        yield PAIRED, next(interpolate(start, end, np.array([before / (before + after)]))), truth
        earlier, later = max(0, held - 3), min(len(keys) - 1, held + 3)
        step = before / max(1, times[held - 1] - times[earlier])
        yield CARRIED, extrapolate(start, end, keys[earlier] if held >= 3 else None, step), truth
        step = after / max(1, times[later] - times[held + 1])
        yield CARRIED, extrapolate(end, start, keys[later] if held + 3 < len(keys) else None, step), truth


def main() -> None:
    """Prints one row a class: median, mean and 95th percentile in metres and in degrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("version")
    arguments = parser.parse_args()
    result = held_back(load_tables(arguments.root, arguments.version))
    table = Table("seen", "class", "objects", "m median", "mean", "95 %", "degrees median", "mean", "95 %")
    for errors in result.errors:
        figures = [
            f"{figure:.{digits}f}"
            for values, digits in ((errors.metres, 3), (errors.degrees, 2))
            for figure in (np.median(values), values.mean(), np.quantile(values, 0.95))
        ]
        table.add_row(errors.kind, errors.name, str(errors.count), *figures)
    console = Console(width=120)
    console.print(table)
    console.print(f"{result.annotated} annotated at held-back key frames, {result.invented} guessed that are not there")


if __name__ == "__main__":
    main()
