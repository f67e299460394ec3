"""The documentation site builds strictly and needs no network; the pages that are generated hold what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

LOADED = re.compile(r"<(?:script|img|iframe|source)[^>]* src=\"(https?:[^\"]*)|<link[^>]* href=\"(https?:[^\"]*)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_the_network(site: Path) -> None:
    outside = {
        (str(page.relative_to(site)), *match)
        for page in site.rglob("*.html")
        for match in LOADED.findall(page.read_text(encoding="utf-8"))
    }
    assert outside == set()
    styles = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.css"))
    assert re.findall(r"@import|url\([\"']?https?:", styles) == []


@pytest.mark.slow
def test_every_verb_package_decision_and_result_has_its_page(site: Path) -> None:
    verbs = (site / "reference/command-line/index.html").read_text(encoding="utf-8")
    assert all(f"magicdrive {verb}" in verbs for verb in ("train", "generate", "validate", "video from-frames"))
    packages = {file.parent.name for file in (PROJECT / "magicdrive_core").glob("*/__init__.py")}
    assert {folder.name for folder in (site / "reference/api").iterdir()} == packages
    for source, folder in (("docs/decisions", "decisions"), ("benchmarks/results", "results")):
        names = {file.stem for file in (PROJECT / source).glob("*.md")} - {"index", "README"}
        assert names <= {page.name for page in (site / folder).iterdir()}


@pytest.mark.slow
def test_the_search_knows_the_settings_and_the_classes(site: Path) -> None:
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    assert "sequence_parallel" in index
    assert "RectifiedFlow" in index
