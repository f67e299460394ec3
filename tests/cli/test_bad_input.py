"""Unusable data and full disks at the command line: one line, a hint, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.utils.files import sha256_folder
from tests.projects import change, copy_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for `dvc repro`


@pytest.fixture
def project(reproduced_project: Path, tmp_path: Path) -> Path:
    """Makes a project on the user's data, as with `make demo DATA=...`."""
    project = copy_project(reproduced_project, tmp_path / "project")
    (project / "data").rename(project / "own")
    change(project, f"data.root={project / 'own'}", "synth=null")
    return project


def fail(project: Path, *words: str, file_bytes: int = resource.RLIM_INFINITY) -> tuple[int, list[str]]:
    """Runs a command that must fail without a traceback; returns exit code and the lines with errors and hints."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    tools = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, [
        line for line in done.stderr.splitlines() if "error: " in line.lower() or " hint: " in line
    ]


def replace(path: Path, data: bytes) -> None:
    """Replaces a file, which is a hard link to another project's file."""
    path.unlink()
    path.write_bytes(data)


def front(project: Path) -> Path:
    """Finds the first front picture of a training scene."""
    scene = next(scene for scene in read_scenes(project / "artifacts/infos") if scene.split == "train")
    return project / "own" / scene.pictures[0][1]


def test_a_missing_picture(project: Path) -> None:
    picture = front(project)
    picture.unlink()
    before = sha256_folder(project / "artifacts/infos")
    code, lines = fail(project, "magicdrive", "infos")
    assert code == 1
    assert lines[0] == f"error: {picture} is missing or empty"
    assert "--render-for" in lines[1]
    assert sha256_folder(project / "artifacts/infos") == before
    code, lines = fail(project, "dvc", "repro", "infos")
    assert lines[0] == f"error: {picture} is missing or empty"  # DVC's own line comes after it
    assert not (project / "artifacts/infos").exists()


def assert_only_resumable(project: Path) -> None:
    """Of a stage that stopped half-way only the whole scenes are left, under a name that no reader looks at."""
    assert all(path.suffix == ".resumable" for path in (project / "artifacts").glob(".*"))


def test_a_truncated_picture(project: Path) -> None:
    picture = front(project)
    replace(picture, picture.read_bytes()[:50_000])
    before = sha256_folder(project / "artifacts/latents")
    code, lines = fail(project, "magicdrive", "latents")
    assert (code, len(lines)) == (1, 2)
    assert lines[0].startswith(f"error: {picture} is not a complete picture")
    assert sha256_folder(project / "artifacts/latents") == before
    assert_only_resumable(project)


def test_a_map_of_another_version(project: Path) -> None:
    for path in (project / "own/maps/expansion").iterdir():
        replace(path, json.dumps(json.loads(path.read_text()) | {"version": "1.2"}).encode())
    code, lines = fail(project, "magicdrive", "conditions")
    assert (code, len(lines)) == (1, 2)
    assert ".json has map version 1.2, expected 1.3" in lines[0]
    assert_only_resumable(project)


@pytest.mark.parametrize("verb", ["infos", "text"])
def test_a_full_disk(project: Path, verb: str) -> None:
    shutil.rmtree(project / "artifacts" / verb)
    code, lines = fail(project, "magicdrive", verb, file_bytes=2048)
    assert (code, len(lines)) == (1, 2)
    assert lines[0].startswith("error: no space left on the disk of artifacts/")
    assert verb in lines[0]
    assert not (project / "artifacts" / verb).exists()
    assert_only_resumable(project)


def test_a_half_written_cache(project: Path) -> None:
    latents = next((project / "artifacts/latents").glob("80x144-1/*"))
    replace(latents, latents.read_bytes()[:-1])
    code, lines = fail(project, "magicdrive", "train", "stage1")
    assert (code, len(lines)) == (1, 2)
    assert f"{latents.relative_to(project)} is missing or incomplete" in lines[0]
    assert "delete artifacts/latents and run `dvc repro`" in lines[0] + lines[1]
