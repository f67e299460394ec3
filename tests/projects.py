"""A small project folder like a user's: the repository's DVC files, tiny settings, generated data, `dvc repro`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from filelock import FileLock

from magicdrive_core.config.load import apply_override
from magicdrive_core.config.profiles import use_profile
from tests.conftest import PROJECT

TINY = [
    "synth={seed: 7, scenes: 2, seconds: 1.5}",  # what the fixture `synthetic_root` holds
    "vae.build.block_out_channels=[8, 12, 12, 16]",
    "vae.build.latent_channels=4",
    "vae.build.steps=2",
    "vae.build.batch=1",
    "vae.build.clips=2",
    "vae.build.crop=32",
    "text.build={width: 16, layers: 1, heads: 2, feed_forward: 16, seed: 1}",
    "latents.start_stride=8",
    "model={width: 32, depth: 1, heads: 2, control_depth: 1, temporal_heads: 2, box_widths: [8], map_channels: [4, 4]}",
    "training.stage1.buckets=[{resolution: 80x144, frames: 1, batch: 1}]",
    "training.stage2.buckets=[{resolution: 80x144, frames: 9, batch: 1}]",
    "training.stage3.buckets=[{resolution: 80x144, frames: 9, batch: 1}]",
    "training.stage1.steps=2",
    "training.stage2.steps=1",
    "training.stage3.steps=1",
    "cluster.ranks=1",
    "generate.steps=1",
    "generate.generations=1",
]


def run(project: Path, *command: str) -> str:
    """Runs a command of this environment in the project's folder; it must succeed. Returns its output."""
    tools = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def make_project(folder: Path, data: Path) -> None:
    """Lays out a project without results; the pictures of ``data`` are linked, not copied."""
    folder.mkdir(parents=True)
    for name in ("profiles", ".dvc"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("cache", "tmp"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(PROJECT / name, folder / name)
    # The whole source: `python -m` prefers modules of the working directory.
    shutil.copytree(
        PROJECT / "magicdrive_core", folder / "magicdrive_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(data, folder / "data", copy_function=os.link)
    use_profile("demo", TINY, project=folder)
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "add", "-q", "data")


def reproduced(base: Path, data: Path) -> Path:
    """Returns the project below ``base`` after ``dvc repro``; the first caller makes it. Do not change its files."""
    folder = base / "project"
    with FileLock(base / "project.lock"):
        if not (folder / "reproduced").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_project(folder, data)
            (folder / "reproduced").write_text(run(folder, "dvc", "repro"))
    return folder


def change(project: Path, *overrides: str) -> None:
    """Edits params.yaml as a user would."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    for override in overrides:
        apply_override(params, override)
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def copy_project(source: Path, target: Path) -> Path:
    """Makes a copy that may be changed; files that nobody writes into are hard links."""
    shutil.copytree(
        source, target, copy_function=os.link, ignore=shutil.ignore_patterns("params.yaml", "*.lock", "tmp")
    )
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(source / name, target / name)
    return target


def readable_by_others(folder: Path, secret: str) -> list[Path]:
    """Files that hold a text and that other users of the machine can read."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = [each for each in [path, *path.parents] if each != folder and each.is_relative_to(folder)]
        private = any(each.stat().st_mode & 0o077 == 0 for each in inside)
        if path.is_file() and not private and secret.encode() in path.read_bytes():
            found.append(path)
    return found
