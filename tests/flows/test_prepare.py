"""Flow `prepare`: what it checks before it calls DVC. For the DVC stages see tests/project/test_dvc.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from prefect.logging import disable_run_logger

from flows import prepare
from magicdrive_core.config.load import load_config
from magicdrive_core.data.infos import build_infos
from magicdrive_core.errors import MagicDriveError
from tests.conftest import PROJECT

REPRO = ["repro"]
FORCED = ["repro", "--force", "--single-item", "infos"]


@pytest.fixture
def calls(synthetic_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collects the calls of DVC in a project that has infos."""
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


WAITING = """
import sys
from pathlib import Path
from flows.prepare import alone
from prefect.logging import disable_run_logger
with disable_run_logger():
    Path("asked").touch()
    with alone():
        Path("entered").touch()
        if sys.argv[1] == "dies":
            sys.stdin.read()
"""


def test_two_flows_prepare_one_after_the_other_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    def start(how: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WAITING, how]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE)

    def wait_for(name: str) -> None:
        end = time.monotonic() + 120
        while not (tmp_path / name).exists():
            assert time.monotonic() < end
            time.sleep(0.01)

    with start("dies") as first:
        wait_for("entered")
        for name in ("asked", "entered"):
            (tmp_path / name).unlink()
        with start("ends") as second:
            wait_for("asked")
            time.sleep(0.2)
            assert not (tmp_path / "entered").exists()
            first.kill()
            assert second.wait(60) == 0
    assert (tmp_path / "entered").exists()


def test_changed_pictures_force_the_infos_stage(calls: list[list[str]]) -> None:
    reproduce()
    assert calls == [REPRO]
    picture = next(Path("data/samples/CAM_BACK").iterdir())
    data = picture.read_bytes()
    picture.unlink()  # a hard link to the shared root
    picture.write_bytes(data + b"\0")
    reproduce()
    assert calls == [REPRO, FORCED, REPRO]


@pytest.mark.parametrize(("folder", "hint"), [("v1.0-demo", "set data.root"), ("maps", "map expansion v1.3")])
def test_missing_tables_or_maps_are_reported_before_dvc_starts(calls: list[list[str]], folder: str, hint: str) -> None:
    shutil.rmtree(Path("data") / folder)
    with pytest.raises(MagicDriveError, match=f"data/{folder} is missing: no nuScenes") as raised:
        reproduce()
    assert hint in raised.value.hint
    assert calls == []


def test_a_pipeline_without_data_says_what_to_do(prefect_api: str, tmp_path: Path) -> None:
    """DVC would only name the missing folder."""
    values = yaml.safe_load((PROJECT / "profiles/demo.yaml").read_text()) | {"synth": None}
    values["data"]["root"] = "nowhere"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    environment = os.environ | {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "flows.pipeline"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "error: nowhere/v1.0-demo is missing: no nuScenes tables there",
        " hint: nowhere does not exist: set data.root in params.yaml, or run `magicdrive synth`",
    ]
