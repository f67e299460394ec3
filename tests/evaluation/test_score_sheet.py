"""A package's score sheet: what is named is scored, what is not is said, nothing is invented."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from magicdrive_core.config.schema import Config
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.score_sheet import Sheet, question, score_package
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.report.score_table import ScoreTable, order_scenes
from magicdrive_core.utils.files import sha256_file
from tests.evaluation.stand_in import SAMPLES, config, write_item


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4)).repeat(1, 134)[:, :400]


def scene(number: int) -> Scene:
    """Sixteen frames of flat pictures."""
    frames, sample = 16, SAMPLES[number]
    return Scene(
        token=f"scene-token-{number}",
        name=f"scene-000{number}",
        split="val",
        location="singapore-onenorth",
        description="Fog.",
        tokens=[f"{sample}{n or ''}" for n in range(frames)],
        key_frames=np.arange(frames) % 6 == 0,
        timestamps=np.arange(frames) * 83_333,
        lidar_to_ego=np.tile(np.eye(4), (frames, 1, 1)),
        ego_to_global=np.tile(np.eye(4), (frames, 1, 1)),
        pictures=[[f"{view}.png" for view in VIEWS]] * frames,
        intrinsics=np.tile(np.eye(3), (frames, 6, 1, 1)),
        camera_to_lidar=np.tile(np.eye(4), (frames, 6, 1, 1)),
        boxes=[FrameBoxes([], [], np.zeros((0, 7)))] * frames,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    for v, view in enumerate(VIEWS):
        Image.new("RGB", (160, 90), (30 * v, 30 * v, 30 * v)).save(folder / f"data/{view}.png")
    for number, sample in enumerate(SAMPLES):  # the second scene is brighter than its real pictures
        write_item(folder / "videos", sample, generation=0, scene=f"scene-token-{number}")
    path = folder / "videos" / f"{SAMPLES[1]}_gen0"
    bright = write_item(folder / "bright", SAMPLES[1], generation=9)
    for file in path.glob("*.mp4"):
        file.write_bytes((folder / "bright" / bright.name / file.name).read_bytes())
    return folder


def settings(*overrides: str) -> Config:
    return config("data.root=data", "generate.generations=1", *overrides)


def test_without_an_i3d_nothing_is_called_fvd(project: Path, tmp_path: Path) -> None:
    scenes = [scene(0), scene(1)]
    sheet = score_package(settings(), project / "videos", "ab" * 32, scenes, project)
    assert set(sheet.figures) == {"small_224", "small_212"}
    assert [line.split(":")[0] for line in sheet.missing] == ["FVD", "mAP", "mIoU", "score"]
    assert sheet.clips == {"real": 12, "generated": 12}
    assert order_scenes(["scene-token-0", "scene-token-1"], sheet) == ["scene-token-1", "scene-token-0"]
    sheet.write(tmp_path)
    assert Sheet.read(tmp_path) == sheet
    table = ScoreTable.of(sheet, {s.token: s.name for s in scenes}, "owls")
    assert table.results[0] == ("owls", ["–"] * 5, True)
    assert len(table.results) == 8
    assert [name for name, _ in table.scenes] == ["scene-0001", "scene-0000"]


def test_the_users_i3d_gives_fvd_under_both_names(project: Path) -> None:
    path = project / "i3d.pt"
    torch.jit.trace(Mean(), torch.zeros(1, 3, 16, 224, 224)).save(str(path))
    named = settings(f"scores.i3d={{path: i3d.pt, sha256: '{sha256_file(path)}'}}")
    sheet = score_package(named, project / "videos", "ab" * 32, [scene(0), scene(1)], project)
    assert {"fvd_224", "fvd_212"} <= set(sheet.figures)
    assert sheet.figures["fvd_224"] == pytest.approx(sheet.figures["fvd_212"], rel=0.05)  # flat pictures
    assert "score" not in sheet.figures
    assert "FVD" not in [line.split(":")[0] for line in sheet.missing]
    assert sheet.inputs == {"i3d.pt": sha256_file(path)}


def test_a_sheet_is_asked_for_again_only_where_something_changed(project: Path) -> None:
    here = question(settings(), "ab" * 32, project)
    assert here == question(settings("generate.workers=7"), "ab" * 32, project)
    (project / "found.json").write_text("{}")
    named = settings("scores.detections=[found.json]")
    others = {question(named, "ab" * 32, project), question(settings(), "cd" * 32, project)}
    (project / "found.json").write_text("[]")
    others.add(question(named, "ab" * 32, project))
    assert len(others | {here}) == 4


def test_what_is_named_must_be_there(project: Path) -> None:
    scenes = [scene(0), scene(1)]
    with pytest.raises(MagicDriveError, match="names 2 files for 1 generations"):
        score_package(settings("scores.bev_masks=[a.npz, b.npz]"), project / "videos", "", scenes, project)
    with pytest.raises(MagicDriveError, match=r"a\.npz is missing"):
        score_package(settings("scores.bev_masks=[a.npz]"), project / "videos", "", scenes, project)
    (project / "data" / "CAM_BACK.png").rename(project / "away.png")
    try:
        with pytest.raises(MagicDriveError, match=r"CAM_BACK\.png is missing"):
            score_package(settings(), project / "videos", "", scenes, project)
    finally:
        (project / "away.png").rename(project / "data" / "CAM_BACK.png")
