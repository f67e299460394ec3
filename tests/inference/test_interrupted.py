"""Generation that is killed five times at random writes the same bytes in the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from magicdrive_core.inference import checked
from magicdrive_core.inference.claims import FOLDER
from tests.inference.generating import all_items, generate, interrupted
from tests.inference.project import make_project, small_config, small_scene


def content(folder: Path) -> dict[str, Any]:
    """Returns all files below a folder of items, records without their durations."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in {FOLDER, checked.FOLDER}:
            files[str(name)] = path.read_bytes()
            if path.name == "item.json":
                files[str(name)] = json.loads(path.read_text()) | {"seconds": None}
    return files


@pytest.mark.slow
def test_a_run_killed_five_times_ends_in_the_same_bytes(tmp_path: Path) -> None:
    make_project(tmp_path, small_config(), small_scene())
    began = time.monotonic()
    generate(tmp_path, tmp_path / "whole")
    took = time.monotonic() - began
    interrupted(tmp_path, tmp_path / "killed", times=5, seconds=took)
    whole, killed = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert len(whole) == 8 * len(all_items(tmp_path))
    assert killed == whole  # and no partial folder is left
