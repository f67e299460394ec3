"""The maps of all frames: what is said before they are drawn, and that an interrupted run goes on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from magicdrive_core.data import map_cache
from magicdrive_core.data.conditions import build_conditions
from magicdrive_core.data.map_cache import map_path
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError


def test_size_and_time_are_told_and_what_is_there_is_not_drawn_again(
    synthetic_root: Path,
    infos: Path,
    scenes: list[Scene],
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = make_config(synthetic_root), tmp_path / "conditions"
    write_map, written = map_cache.write_map, []
    told: list[str] = []

    def stopped(path: Path, bits: Any) -> None:
        if tmp_path in path.parents:
            told.append(capsys.readouterr().err)
            if written:
                raise KeyboardInterrupt
            written.append(path)
        write_map(path, bits)

    monkeypatch.setattr(map_cache, "write_map", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_conditions(config, infos, out)
    frames = sum(map(len, scenes))
    found = re.search(rf"BEV maps: {frames} frames of 2 scenes, ([\d.]+) MB, about 0\.\d minutes", told[0])
    assert found
    assert not out.exists()

    monkeypatch.setattr(map_cache, "write_map", write_map)
    drawn: list[int] = []
    rasterise = map_cache.rasterise
    monkeypatch.setattr(map_cache, "rasterise", lambda *given: drawn.append(len(given[1])) or rasterise(*given))
    build_conditions(config, infos, out)
    again = capsys.readouterr().err
    assert f"BEV maps: {len(scenes[1])} frames of 1 scenes" in again  # one number of cells: a file is a scene
    assert drawn == [4, len(scenes[1])]
    size = sum(map_path(out, scene.token, 200).stat().st_size for scene in scenes)
    assert [path.name for path in tmp_path.iterdir()] == ["conditions"]
    build_conditions(config, infos, tmp_path / "at once")
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "at once" / path.relative_to(out)).read_bytes()
    assert float(found[1]) == pytest.approx(size / 1e6, abs=0.06)


def test_a_full_disk_is_told_before_the_work(
    synthetic_root: Path, infos: Path, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(MagicDriveError, match=r"BEV maps need .* GB") as error:
        build_conditions(make_config(synthetic_root), infos, tmp_path / "conditions")
    assert "conditions.maps" in error.value.hint
