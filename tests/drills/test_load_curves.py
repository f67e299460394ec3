"""Time and memory at the size of real data: they grow in proportion at most."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from magicdrive_core.utils.files import atomic_file
from tests.conftest import PROJECT
from tests.drills.conftest import Drill, machine

RESULTS, PLOT = PROJECT / "benchmarks/results/load.md", PROJECT / "docs/pictures/load.svg"
FULL = {"frames": 100_000, "items": 10_000, "runs": 1_000}
TITLES = {
    "frames": "go through the infos of all frames, 30 boxes each",
    "items": "look through finished items before a flow starts",
    "runs": "record 20 more runs in MLflow's database",
}
HEAD = """# Load

`make drills` measures each size in a process of its own and draws the curves. Memory is what the work adds to the
process; a process that has imported everything holds 250 MB.

{machine}

![Time and memory against size](../../docs/pictures/load.svg)

| work | size | CPU seconds | memory added, MB |
| --- | --- | --- | --- |
"""

Curves = dict[str, list[tuple[int, float, float]]]
"""For each kind of load: size, CPU seconds, MB added."""


def measure(kind: str, count: int, folder: Path) -> tuple[float, float]:
    """Return CPU seconds and added MB of one size; a database of runs grows from size to size."""
    if kind != "runs":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.drills.load", kind, str(count), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    return values["seconds"], values["peak"] - values["before"]


@pytest.mark.drill
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", FULL)
def test_time_and_memory_grow_in_proportion_at_most(drill: Drill, tmp_path: Path, kind: str) -> None:
    """Load: four sizes up to 100,000 frames, 10,000 items, 1,000 runs."""
    sizes = [drill.scaled(FULL[kind] // part) // 50 * 50 for part in (8, 4, 2, 1)]
    measured = [(size, *measure(kind, size, tmp_path / kind)) for size in sizes]
    drill.compared += len(sizes)
    write_results(recorded() | {kind: measured})
    (_, seconds, memory), (_, all_seconds, all_memory) = measured[1], measured[3]
    growth = 1 if kind == "runs" else 4  # the last run costs what the first one did
    assert all_seconds < 2 * growth * seconds + 1
    assert all_memory < 2 * growth * memory + 50
    if kind == "items":
        assert all_seconds < 40  # 5,000 in 20 s


def recorded() -> Curves:
    """Return the curves of the table as it is."""
    curves: Curves = {}
    text = RESULTS.read_text(encoding="utf-8").replace(",", "") if RESULTS.exists() else ""
    for kind, title in TITLES.items():
        rows = re.findall(rf"^\| {title.replace(',', '')} \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
        if rows:
            curves[kind] = [(int(size), float(seconds), float(memory)) for size, seconds, memory in rows]
    return curves


def write_results(curves: Curves) -> None:
    """Write the table and draw the curves."""
    rows = [
        f"| {TITLES[kind]} | {size:,} | {seconds:.2f} | {memory:.1f} |"
        for kind, sizes in curves.items()
        for size, seconds, memory in sizes
    ]
    with atomic_file(RESULTS) as partial:
        partial.write_text(HEAD.format(machine=machine()) + "\n".join(rows) + "\n", encoding="utf-8")
    with (
        mpl.rc_context({**mpl.rcParamsDefault, "svg.hashsalt": "load", "svg.fonttype": "none"}),
        atomic_file(PLOT) as out,
    ):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for axes, column, label in zip(figure.subplots(1, 2), (1, 2), ("CPU seconds", "MB added"), strict=True):
            for kind, sizes in curves.items():
                full = max(size for size, *_ in sizes)
                axes.plot(
                    [row[0] / full for row in sizes], [row[column] for row in sizes], "o-", label=f"{full:,} {kind}"
                )
            axes.set_xlabel("share of the full size")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
        figure.savefig(out, format="svg", metadata={"Date": None})
