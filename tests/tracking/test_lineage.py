"""Lineage tags from real repositories and lock files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from magicdrive_core.config.load import load_config
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.lineage import INPUTS, input_digests, lineage_tags

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"

LOCK = """
schema: '2.0'
stages:
  infos:
    cmd: magicdrive infos
    outs:
    - {path: artifacts/infos, hash: md5, md5: 0123456789abcdef0123456789abcdef.dir, size: 1}
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_inputs_are_known_by_dvc_else_by_their_index(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(LOCK)
    index = tmp_path / "artifacts/text/index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")
    first = input_digests(tmp_path)
    assert set(first) == set(INPUTS)
    assert first["artifacts/infos"] == "0123456789abcdef0123456789abcdef.dir"
    assert first["artifacts/latents"] == "absent"
    index.write_text('{"a": 1}')
    changed = {path for path, digest in input_digests(tmp_path).items() if digest != first[path]}
    assert changed == {"artifacts/text"}


def test_a_broken_lock_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text("a: [")
    with pytest.raises(MagicDriveError, match=r"dvc\.lock is not valid YAML"):
        input_digests(tmp_path)


def test_tags_tell_commit_and_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "flow-1")
    config = load_config(PROFILE)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    tags = lineage_tags(config, tmp_path)
    assert tags["git.commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert tags["git.dirty"] == "false"
    assert tags["prefect.flow_run"] == "flow-1"
    assert tags["dvc.latents"] == "absent"
    (tmp_path / "file").write_text("b")
    assert lineage_tags(config, tmp_path)["git.dirty"] == "true"


def test_without_repository_and_flow_there_are_no_such_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    tags = lineage_tags(load_config(PROFILE), tmp_path)
    assert not {tag for tag in tags if tag.startswith(("git.", "prefect."))}
    assert tags["params"] != lineage_tags(load_config(PROFILE, ["training.max_grad_norm=2.0"]), tmp_path)["params"]
