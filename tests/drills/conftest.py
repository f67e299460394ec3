"""The account of a drill: what was injected, what was compared, what was lost; `make drills` writes it down."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from magicdrive_core.utils.files import atomic_file
from tests.conftest import PROJECT

RESULTS = PROJECT / "benchmarks/results/drills.md"
SCALE = float(os.environ.get("DRILL_SCALE", "1"))  # of the counts of long drills: DRILL_SCALE=0.1 make drills

HEAD = """# Drills

Faults injected on purpose, and what was lost. `make drills` runs them with fixed seeds and writes the rows of those
that ran; the others keep their last result. "Compared" counts results that were compared with those of an undisturbed
run, or checked to be whole.

{machine}

| drill | faults injected | compared | lost | seconds |
| --- | --- | --- | --- | --- |
"""

PASSED = pytest.StashKey[bool]()

_rows: dict[str, str] = {}


@dataclass
class Drill:
    """The account of one drill.

    Attributes:
        faults: faults injected so far.
        compared: results compared or checked so far.
        lost: those that were missing or wrong.
    """

    faults: int = 0
    compared: int = 0
    lost: int = 0

    def compare(self, found: object, expected: object) -> None:
        """Count a comparison of results; they must be equal."""
        self.compared += 1
        self.lost += found != expected
        assert found == expected

    def scaled(self, count: int) -> int:
        """Return the number of faults to inject of those that the whole drill has."""
        return max(1, round(SCALE * count))


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> Iterator[Drill]:
    """Keep the account of this test; a long drill's row enters the results."""
    account, began = Drill(), time.monotonic()
    yield account
    if request.node.get_closest_marker("drill"):
        seconds = time.monotonic() - began
        title = " ".join((request.function.__doc__ or request.node.name).partition(".")[0].split())
        if callspec := getattr(request.node, "callspec", None):
            title += f" ({callspec.id})"
        lost = str(account.lost or "none") if request.node.stash.get(PASSED, False) else "the drill failed"
        _rows[title] = f"| {title} | {account.faults:,} | {account.compared:,} | {lost} | {seconds:.0f} |"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which drills passed, before their accounts are closed."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


def pytest_sessionfinish() -> None:
    """Write the rows of the drills that ran, and keep those of the others."""
    if not _rows:
        return
    kept = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = {line.split("|")[1].strip(): line for line in kept if re.match(r"\| (?!drill |---)", line)} | _rows
    with atomic_file(RESULTS) as partial:
        partial.write_text(HEAD.format(machine=machine()) + "\n".join(sorted(rows.values())) + "\n", encoding="utf-8")


def machine() -> str:
    """Describe the machine without its name."""
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    load = os.getloadavg()[0]
    return (
        f"Measured on {models[0] if models else platform.machine()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}; load average at the end {load:.1f}."
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 2 MB of its own. Ballast of any size fills it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, free: int = 0) -> Path:
    """Fill a small disk up to ``free`` bytes; returns the file to delete for room."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb") as file:
        while (room := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free) > 0:
            file.write(bytes(min(room, 1 << 16)))
            file.flush()
    return ballast
