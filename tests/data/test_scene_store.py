"""The scene store: written by several processes, resumed after an interruption, read by mapping files."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.nuscenes_scenes import NuScenesScenes
from magicdrive_core.data.records import Scene, SceneHeader
from magicdrive_core.data.scene_store import ScenesByToken, from_table, scene_path
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.process_pool import for_each_scene


def assert_equal_folders(folder: Path, other: Path) -> None:
    files = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file


def test_interrupted_infos_resume_after_the_written_scenes(
    synthetic_root: Path, infos: Path, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    adapter_read = NuScenesScenes.read

    def stop_at_the_second(self: NuScenesScenes, name: str, split: str) -> Scene:
        if read:
            raise KeyboardInterrupt
        read.append(name)
        return adapter_read(self, name, split)

    monkeypatch.setattr(NuScenesScenes, "read", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build_infos(make_config(synthetic_root), tmp_path / "infos")
    assert not (tmp_path / "infos").exists()
    again: list[str] = []
    monkeypatch.setattr(
        NuScenesScenes, "read", lambda self, name, split: again.append(name) or adapter_read(self, name, split)
    )
    build_infos(make_config(synthetic_root), tmp_path / "infos")
    assert len(read) + len(again) == 2
    assert not set(read) & set(again)
    assert [path.name for path in tmp_path.iterdir()] == ["infos"]
    assert_equal_folders(tmp_path / "infos", infos)


def test_any_number_of_processes_gives_equal_infos(
    synthetic_root: Path, infos: Path, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("magicdrive_core.utils.process_pool.SCENES_A_WORKER", 1)
    build_infos(make_config(synthetic_root), tmp_path / "infos")
    assert_equal_folders(tmp_path / "infos", infos)
    assert not multiprocessing.active_children()


def _fail_at_once_or_never_end(scene: int) -> None:
    if scene == 0:
        raise MagicDriveError("the first scene is broken")
    multiprocessing.Event().wait()


def test_a_fault_stops_the_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("magicdrive_core.utils.process_pool.SCENES_A_WORKER", 1)
    with pytest.raises(MagicDriveError, match="the first scene is broken"):
        for_each_scene(_fail_at_once_or_never_end, range(2), "scenes", start="fork")
    assert not multiprocessing.active_children()


def test_scenes_are_mapped_and_equal_the_parquet_file(infos: Path, scenes: list[Scene]) -> None:
    with pq.ParquetFile(infos / "frames.parquet") as file:
        assert file.num_row_groups == len(scenes) == 2
        for group, scene in enumerate(scenes):
            stored = from_table(file.read_row_group(group))
            assert (stored.token, stored.tokens, stored.pictures) == (scene.token, scene.tokens, scene.pictures)
            np.testing.assert_array_equal(stored.camera_to_lidar, scene.camera_to_lidar)
            np.testing.assert_array_equal(stored.boxes[7].boxes, scene.boxes[7].boxes)
    before = pa.total_allocated_bytes()
    kept = list(read_scenes(infos))
    arrays = [getattr(scene, name) for scene in kept for name in ("intrinsics", "camera_to_lidar", "ego_to_global")]
    arrays += [frame.boxes for scene in kept for frame in scene.boxes]
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays)
    assert pa.total_allocated_bytes() - before < sum(array.nbytes for array in arrays) / 10


def test_scenes_are_found_by_token_and_by_slice(infos: Path, scenes: list[Scene]) -> None:
    found = ScenesByToken(scenes, [SceneHeader.of(scene) for scene in scenes])
    assert list(found) == [scene.token for scene in scenes]
    assert found[scenes[1].token].name == scenes[1].name
    assert [scene.name for scene in scenes[1:]] == [scenes[1].name]
    assert "nobody" not in found


def test_incomplete_and_foreign_scenes_are_refused(infos: Path, scenes: list[Scene], tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match="is missing") as error:
        read_scenes(tmp_path)
    assert "dvc repro" in error.value.hint
    path = scene_path(tmp_path, scenes[0].name)
    path.parent.mkdir()
    whole = scene_path(infos, scenes[0].name).read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:-4] + b"ROW2"):
        path.write_bytes(broken)
        with pytest.raises(MagicDriveError, match=rf"{path.name} cannot be read") as error:
            list(read_scenes(tmp_path))
        assert "dvc repro" in error.value.hint
    with pa.ipc.new_file(str(path), pa.schema([("scene", pa.string())])) as file:
        file.write_table(pa.table({"scene": ["a"]}))
    with pytest.raises(MagicDriveError, match="written by another version"):
        list(read_scenes(tmp_path))
