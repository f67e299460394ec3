"""Runs the DVC stages: what is reproduced, when, and on which data."""

from __future__ import annotations

import csv
import pydoc
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from pydantic import BaseModel

from magicdrive_core.config.schema import Config
from magicdrive_core.utils.files import read_json, sha256_file
from tests.projects import change, copy_project, run

VERSIONS = "magicdrive_core/config/versions.py"
pytestmark = pytest.mark.timeout(900)  # the first test waits for all stages while other workers use the cores
STAGES = {"infos", "conditions", "encoders", "text", "latents"}


@pytest.fixture
def project(reproduced_project: Path, tmp_path: Path) -> Path:
    """Makes a copy that a test may change."""
    return copy_project(reproduced_project, tmp_path / "project")


def rewrite(path: Path, change_text: Callable[[str], str]) -> None:
    """Changes a file that may be a link to another project's."""
    text = path.read_text()
    changed = change_text(text)
    assert changed != text
    path.unlink()
    path.write_text(changed)


def status(project: Path) -> set[str]:
    """Returns the names of the stages that `dvc status` finds stale, and "data.dvc"."""
    with Repo(str(project)) as repo:
        found: dict[str, Any] = repo.status()
    return {re.split("[:/]", name)[-1] for name in found}


def test_every_stage_runs_once_and_is_then_up_to_date(reproduced_project: Path) -> None:
    first = (reproduced_project / "reproduced").read_text()
    assert all(f"Running stage '{stage}'" in first for stage in STAGES)
    assert status(reproduced_project) == set()
    again = run(reproduced_project, "dvc", "repro")
    assert "Running stage" not in again
    assert again.count("didn't change, skipping") == len(STAGES) + 1


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("training.stage1.steps=3", set()),
        ("generate.steps=2", set()),
        ("generate.frames=9", {"conditions"}),
        ("latents.dtype=float32", {"latents"}),
        ("latents.start_stride=4", {"conditions", "latents"}),
        ("text.max_tokens=8", {"encoders", "text"}),
        ("vae.build.steps=3", {"encoders"}),
        ("data.val_scenes=[demo-2001]", {"infos", "conditions"}),
        ("training.stage2.buckets=[{resolution: 80x144, frames: 17, batch: 1}]", {"conditions", "latents"}),
    ],
)
def test_a_changed_setting_makes_only_its_stages_stale(project: Path, override: str, stale: set[str]) -> None:
    change(project, override)
    assert status(project) == stale


@pytest.mark.parametrize(
    ("version", "stale"),
    [
        ("INFOS_VERSION", {"infos"}),
        ("BEV_MAPS_VERSION", {"conditions"}),
        ("CONDITIONS_VERSION", {"conditions", "text", "latents"}),
        ("CITY_VERSION", {"encoders", "latents"}),
        ("ENCODERS_VERSION", {"encoders"}),
        ("TEXT_VERSION", {"text"}),
        ("VAE_VERSION", {"encoders", "latents"}),
        ("LATENTS_VERSION", {"latents"}),
        ("NETWORK_VERSION", set()),
    ],
)
def test_a_raised_version_makes_its_stages_stale(project: Path, version: str, stale: set[str]) -> None:
    rewrite(project / VERSIONS, lambda text: re.sub(rf"(?m)^{version} = \d+$", f"{version} = 99", text))
    assert status(project) == stale


def test_a_comment_in_the_source_makes_no_stage_stale(project: Path) -> None:
    for file in (VERSIONS, "magicdrive_core/data/infos.py", "magicdrive_core/encoders/vae.py"):
        rewrite(project / file, lambda text: text + "\n# A comment.\n")
    assert status(project) == set()


def test_only_the_stale_stage_runs_again(project: Path) -> None:
    change(project, "generate.frames=9")
    out = run(project, "dvc", "repro")
    assert [line for line in out.splitlines() if line.startswith("Running")] == ["Running stage 'conditions':"]
    assert status(project) == set()


def test_an_earlier_run_with_another_resolution_is_not_reused(project: Path) -> None:
    """DVC ignores every key named size when it looks for an earlier run (its issue 10296)."""
    change(project, "training.stage2.buckets=[{resolution: 96x176, frames: 9, batch: 1}]")
    out = run(project, "dvc", "repro", "conditions")
    assert "Running stage 'conditions':" in out
    assert set(read_json(project / "artifacts/conditions/clips.json")["train"]) == {"80x144", "96x176"}


def test_no_setting_has_a_name_that_dvc_ignores() -> None:
    def names(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield name
            for part in re.findall(r"magicdrive_core[\w.]+", str(field.annotation)):
                yield from names(pydoc.locate(part))

    found = set(names(Config))
    assert {"resolution", "buckets", "block_out_channels"} <= found  # of sections, lists and optional ones
    assert found.isdisjoint({"size", "nfiles"})


def test_data_dvc_is_satisfied_by_the_same_bytes_without_a_cache(project: Path) -> None:
    shutil.rmtree(project / ".dvc/cache")
    before = (project / "data.dvc").read_bytes()
    run(project, "dvc", "commit", "data.dvc")  # what `dvc repro` does with data that is not cached
    assert (project / "data.dvc").read_bytes() == before
    assert "data.dvc" not in status(project)


def test_pictures_are_versioned_by_their_digests_alone(project: Path) -> None:
    with (project / "data/manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    for row in rows[::20]:
        assert sha256_file(project / "data" / row["path"]) == row["sha256"]
    cached = {path.read_bytes()[:2] for path in (project / ".dvc/cache").rglob("*") if path.is_file()}
    assert b"\xff\xd8" not in cached  # no JPEG
    shutil.rmtree(project / "data/samples")
    assert "data.dvc" not in status(project)


def test_a_changed_table_makes_the_data_and_the_infos_stale(project: Path) -> None:
    table = project / "data/v1.0-demo/scene.json"
    text = table.read_text()
    table.unlink()  # a hard link to another project's file
    table.write_text(text + "\n")
    assert status(project) == {"data.dvc", "infos"}


def test_data_in_another_folder_leaves_data_dvc_unchanged(project: Path, synthetic_root: Path) -> None:
    before = (project / "data.dvc").read_bytes()
    change(project, f"data.root={synthetic_root}")
    change(project, "synth=null")
    shutil.rmtree(project / "data")
    run(project, "dvc", "repro", "infos")
    assert (project / "data.dvc").read_bytes() == before
    assert "infos" not in status(project)
