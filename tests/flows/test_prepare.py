"""Flow `prepare`: what it looks at before it calls DVC. DVC's own runs: tests/platform/test_dvc.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from flows import prepare
from magicdrive_core.data.infos import build_infos
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.settings import load_config
from tests.conftest import PROJECT

REPRO = ["repro"]
FORCED = ["repro", "--force", "--single-item", "infos"]


@pytest.fixture
def calls(synthetic_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What DVC is asked to do, in a project whose infos are made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(synthetic_root, tmp_path / "data", copy_function=os.link)
    shutil.copy(PROJECT / "profiles/demo.yaml", tmp_path / "params.yaml")
    build_infos(load_config(), prepare.INFOS)
    asked: list[list[str]] = []
    monkeypatch.setattr(prepare, "run_child", lambda command: asked.append(command[1:]))
    return asked


def reproduce() -> None:
    with disable_run_logger():
        prepare.reproduce.fn()


def test_exchanged_pictures_force_the_infos(calls: list[list[str]]) -> None:
    reproduce()
    assert calls == [REPRO]
    picture = next(Path("data/samples/CAM_BACK").iterdir())
    data = picture.read_bytes()
    picture.unlink()  # it is a link to another root's
    picture.write_bytes(data + b"\0")
    reproduce()
    assert calls == [REPRO, FORCED, REPRO]


@pytest.mark.parametrize(("folder", "hint"), [("v1.0-demo", "set data.root"), ("maps", "map expansion v1.3")])
def test_a_root_without_tables_or_maps_never_reaches_dvc(calls: list[list[str]], folder: str, hint: str) -> None:
    shutil.rmtree(Path("data") / folder)
    with pytest.raises(MagicDriveError, match=f"data/{folder} is missing: no nuScenes") as raised:
        reproduce()
    assert hint in raised.value.hint
    assert calls == []
