"""The map cache: files, the announcement before drawing, resumption and disk space."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicdrive_core.data import map_cache
from magicdrive_core.data.conditions import build_conditions
from magicdrive_core.data.map_cache import map_path, read_map, write_map
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError


def test_size_and_time_are_announced_and_existing_maps_are_not_drawn_again(
    synthetic_root: Path,
    infos: Path,
    scenes: list[Scene],
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = make_config(synthetic_root), tmp_path / "conditions"
    written: list[Path] = []
    announced: list[str] = []

    def stopped(path: Path, bits: Any) -> None:
        if tmp_path in path.parents:
            announced.append(capsys.readouterr().err)
            if written:
                raise KeyboardInterrupt
            written.append(path)
        write_map(path, bits)

    monkeypatch.setattr(map_cache, "write_map", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_conditions(config, infos, out)
    frames = sum(map(len, scenes))
    found = re.search(rf"BEV maps: {frames} frames of 2 scenes, ([\d.]+) MB, about 0\.\d minutes", announced[0])
    assert found
    assert not out.exists()

    monkeypatch.setattr(map_cache, "write_map", write_map)
    drawn: list[int] = []
    rasterise = map_cache.rasterise
    monkeypatch.setattr(map_cache, "rasterise", lambda *args: drawn.append(len(args[1])) or rasterise(*args))
    build_conditions(config, infos, out)
    again = capsys.readouterr().err
    assert f"BEV maps: {len(scenes[1])} frames of 1 scenes" in again  # one number of cells, so one file for each scene
    assert drawn == [4, len(scenes[1])]
    size = sum(map_path(out, scene.token, 200).stat().st_size for scene in scenes)
    assert [path.name for path in tmp_path.iterdir()] == ["conditions"]
    build_conditions(config, infos, tmp_path / "uninterrupted")
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "uninterrupted" / path.relative_to(out)).read_bytes()
    assert float(found[1]) == pytest.approx(size / 1e6, abs=0.06)


def test_a_full_disk_is_reported_before_drawing(
    synthetic_root: Path, infos: Path, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(MagicDriveError, match=r"BEV maps need .* GB") as error:
        build_conditions(make_config(synthetic_root), infos, tmp_path / "conditions")
    assert "conditions.maps" in error.value.hint


def test_maps_survive_the_round_trip_with_bytes_independent_of_time(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    folder = tmp_path / "bev" / "20"
    write_map(folder / "a.npz", bits)
    np.testing.assert_array_equal(read_map(tmp_path, "a", 20), bits)
    first = (folder / "a.npz").read_bytes()
    write_map(folder / "b.npz", bits)
    assert (folder / "b.npz").read_bytes() == first
    with np.load(folder / "a.npz") as archive:
        assert archive.files == ["map"]
    with zipfile.ZipFile(folder / "a.npz") as archive:
        assert [entry.date_time for entry in archive.infolist()] == [(1980, 1, 1, 0, 0, 0)]


def test_incomplete_maps_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bev" / "20"
    write_map(folder / "a.npz", np.ones((3, 20, 20), np.uint8))
    whole = (folder / "a.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    for broken in (whole[:-30], b"", b"no archive", bytes(damaged)):
        (folder / "a.npz").write_bytes(broken)
        with pytest.raises(MagicDriveError, match=r"a.npz cannot be read") as error:
            read_map(tmp_path, "a", 20)
        assert "dvc repro" in error.value.hint
    with pytest.raises(MagicDriveError, match="is missing"):
        read_map(tmp_path, "b", 20)
    write_map(tmp_path / "bev" / "40" / "a.npz", np.ones((3, 20, 20), np.uint8))
    with pytest.raises(MagicDriveError, match="expected uint8 \\(F, 40, 40\\)"):
        read_map(tmp_path, "a", 40)
