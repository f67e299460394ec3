"""The preview of changes: a picture of before and after, and the list of what can be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from magicdrive_core.cli.main import app
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.records import Scene
from magicdrive_core.report.edit_preview import draw_preview, list_objects


def test_before_and_after_differ_where_something_was_added(
    synthetic_root: Path, scenes: list[Scene], make_config: Any, tmp_path: Path
) -> None:
    config = make_config(synthetic_root)
    config = config.model_copy(update={"conditions": config.conditions.model_copy(update={"maps": "live"})})
    pictures = []
    for edits in (Edits(), Edits.model_validate({"objects": [{"add": "bus", "points": [{"at": [0, 12]}]}]})):
        draw_preview(config, scenes[0], edits, 3, tmp_path / "preview.png")
        pictures.append(np.asarray(Image.open(tmp_path / "preview.png")).astype(int))
    plain, added = pictures
    assert plain.shape == added.shape
    changed = np.abs(plain - added).sum(-1) > 60
    assert not changed[: len(changed) // 2].any()
    assert changed[len(changed) // 2 :].sum() > 2000


def test_the_verb_lists_objects_and_names_what_is_wrong(
    infos: Path, scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/infos").symlink_to(infos)
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["preview-edits", "--scene", scenes[0].name])
    assert listed.exit_code == 0, listed.output
    rows = list_objects(scenes[0])
    assert len(listed.output.splitlines()) == len(rows) == len({t for frame in scenes[0].boxes for t in frame.ids})
    assert [row[3] for row in rows] == sorted(row[3] for row in rows)
    for arguments, message in (
        (["--scene", "x"], "no scene 'x'"),
        (["--scene", scenes[0].name, "--frame", "99"], "99"),
    ):
        result = CliRunner().invoke(app, ["preview-edits", *arguments])
        assert message in str(result.exception)
