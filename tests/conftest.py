"""Fixtures that the tests of several packages share: reference data, small data roots, infos, a reproduced project."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from hypothesis import HealthCheck, settings

from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import Config, Synth
from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.records import Scene
from magicdrive_core.synthetic.dataset import synthesize
from tests.golden.sets import SETS

PROJECT = Path(__file__).resolve().parents[1]

MakeConfig = Callable[..., Config]

# A busy machine is no fault of the code: properties are judged by what they say, not by how long an example takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("untimed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names in one line what was skipped, and why: a check that nobody misses is no check."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
        why = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"not checked, {len(skipped)} tests skipped: {why}", yellow=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of measured reference data beside the checkout."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the reference data folder ../shared is not here")
    return folder


@pytest.fixture(scope="session", params=SETS.values(), ids=SETS)
def golden_set(request: pytest.FixtureRequest) -> Path:
    """A folder of golden files: the compact set of the repository, then the full one where it is here."""
    return request.param


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A small generated data root, version v1.0-demo: two scenes (day, night) of 1.5 s. Tests must not change it."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # shared by the workers of pytest-xdist
    root = folder / "synthetic"
    with FileLock(folder / "synthetic.lock"):
        synthesize(Synth(seed=7, scenes=2, seconds=1.5), root, "v1.0-demo")
    return root


@pytest.fixture(scope="session")
def reproduced_project(tmp_path_factory: pytest.TempPathFactory, worker_id: str, synthetic_root: Path) -> Path:
    """A small project in which `dvc repro` was run. Tests must not change it: ``projects.copy_project``."""
    from tests.projects import reproduced

    base = tmp_path_factory.getbasetemp()
    return reproduced(base if worker_id == "master" else base.parent, synthetic_root)


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """``make_config(root, version, published=False, val_scenes="auto")``: the demo's on another data root."""

    def make(root: Path, version: str = "v1.0-demo", *, published: bool = False, val_scenes: object = "auto") -> Config:
        values = yaml.safe_load((PROJECT / "profiles/demo.yaml").read_text(encoding="utf-8"))
        values["conditions"]["map_cells"] = {"80x144": 200, "96x176": 200}
        values["latents"]["start_stride"] = 4
        values |= {"published": published, "data": {"root": str(root), "version": version, "val_scenes": val_scenes}}
        return parse_config(values)

    return make


@pytest.fixture(scope="session")
def infos(synthetic_root: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Infos of the generated data, by time stamp. Tests must not change them."""
    folder = tmp_path_factory.mktemp("infos") / "infos"
    build_infos(make_config(synthetic_root), folder)
    return folder


@pytest.fixture(scope="session")
def scenes(infos: Path) -> list[Scene]:
    """The generated scenes."""
    return read_scenes(infos)


@pytest.fixture
def root_copy(synthetic_root: Path, tmp_path: Path) -> Path:
    """A copy of the generated data root that a test may change; pictures are links."""
    shutil.copytree(synthetic_root, tmp_path / "root", copy_function=_copy)
    return tmp_path / "root"


def _copy(source: str, target: str) -> None:
    if source.endswith(".jpg"):
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)
