"""Items do not depend on order and worker, and finished items stay as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference import generate
from magicdrive_core.inference import writer as writing
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import Item, list_items
from magicdrive_core.video.decoder import decode_video, probe
from magicdrive_core.video.frames import full_size_image, read_view
from magicdrive_core.video.item_record import ItemRecord
from tests.inference.project import STAGE, make_project, small_config, small_scene


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, small_config(), small_scene())
    return folder


@pytest.fixture(scope="module")
def items(project: Path) -> list[Item]:
    return list_items(small_config(), read_scenes(project / "artifacts/infos"))


@pytest.fixture(scope="module")
def made(project: Path, items: list[Item]) -> Path:
    out = project / "outputs/generate"
    summary = generate_items(small_config(), items, project / STAGE, out, project=project)
    assert summary.made == [item.name for item in items]
    return out


def digests(out: Path, item: Item) -> dict[str, str]:
    return {view: entry.sha256 for view, entry in ItemRecord.read(out / item.name).views.items()}


def test_an_item_is_six_videos_a_record_and_a_sheet(made: Path, items: list[Item]) -> None:
    record = ItemRecord.read(made / items[0].name)
    assert list(record.views) == sorted(VIEWS)
    for view, entry in record.views.items():
        info = probe(made / items[0].name / entry.file)
        assert entry.file == f"{record.sample}_{view}.mp4"
        assert (info.frames, info.fps, info.height, info.width) == (2, 12.0, 900, 1600)
        assert entry.mbit_s is not None
        assert entry.mbit_s <= small_config().video.max_mbit_s
    assert (record.generated, record.frames) == (9, 2)
    assert {"model", "versions", "infos", "conditions", "encoders", "text"} <= record.lineage.keys()
    with Image.open(made / items[0].name / "sheet.png") as sheet:
        assert sheet.width > 2 * 3 * 64


def test_no_camera_picture_is_opened(made: Path, project: Path) -> None:
    """Generation succeeded although no camera picture exists."""
    scenes = read_scenes(project / "artifacts/infos")
    named = {path for scene in scenes for views in scene.pictures for path in views}
    assert named
    assert not any((root / path).exists() for root in (project, project / small_config().data.root) for path in named)


def test_views_and_generations_differ(made: Path, items: list[Item]) -> None:
    first, second = (digests(made, item) for item in items)
    assert len({*first.values(), *second.values()}) == 12


def test_cropped_rows_come_back_black(made: Path, items: list[Item]) -> None:
    frame = next(decode_video(made / items[0].name / f"{items[0].name.split('_')[0]}_CAM_BACK.mp4"))
    assert frame[:90].max() < 40  # 32x64 at full width has 800 rows
    assert frame[110:].max() > 60


def test_an_item_does_not_depend_on_the_other_items_and_the_worker(
    made: Path, items: list[Item], project: Path, tmp_path: Path
) -> None:
    alone = generate_items(small_config(), items[1:], project / STAGE, tmp_path, shard=(1, 2), project=project)
    assert alone.made == [items[1].name]
    assert digests(tmp_path, items[1]) == digests(made, items[1])


def test_finished_items_are_skipped_and_damaged_ones_made_again(
    made: Path, items: list[Item], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    with monkeypatch.context() as nothing:
        nothing.setattr(
            generate.Models, "load", lambda *_: pytest.fail("weights were loaded although every item was finished")
        )
        assert generate_items(small_config(), items, project / STAGE, out, project=project).skipped == [
            item.name for item in items
        ]
    (out / items[0].name / f"{items[0].name.split('_')[0]}_CAM_FRONT.mp4").write_bytes(b"")
    summary = generate_items(small_config(), items, project / STAGE, out, project=project)
    assert (summary.made, summary.skipped) == ([items[0].name], [items[1].name])
    assert digests(out, items[0]) == digests(made, items[0])


def test_an_item_that_fails_twice_does_not_stop_the_others(
    items: list[Item], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writing.write_frames

    def broken(frames: Iterable[np.ndarray], folder: Path) -> None:
        if f"{items[0].name}." in str(folder):
            raise MagicDriveError("no space left on the disk")
        real(frames, folder)

    monkeypatch.setattr(writing, "write_frames", broken)
    config = small_config("video.format=png")
    with pytest.raises(MagicDriveError, match=rf"1 of 2 items failed, each 2 times. {items[0].name}: no space left"):
        generate_items(config, items, project / STAGE, tmp_path, project=project)
    assert not (tmp_path / items[0].name).exists()
    assert (tmp_path / items[1].name / "item.json").is_file()


def test_weights_that_training_did_not_write_are_refused(items: list[Item], project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(project / STAGE, run)
    (run / "ema.safetensors").write_bytes(b"other")
    with pytest.raises(MagicDriveError, match="not the file that training wrote"):
        generate_items(small_config(), items, run, tmp_path / "out", project=project)
    with pytest.raises(MagicDriveError, match=r"run\.json is missing"):
        generate_items(small_config(), items, tmp_path / "none", tmp_path / "out", project=project)


def test_a_single_frame_is_written_as_pictures(tmp_path: Path) -> None:
    config: Config = small_config("generate.generations=1")
    make_project(tmp_path, config, small_scene(1))
    items = list_items(config, read_scenes(tmp_path / "artifacts/infos"))
    generate_items(config, items, tmp_path / STAGE, tmp_path / "out", project=tmp_path)
    record = ItemRecord.read(tmp_path / "out" / items[0].name)
    assert {Path(entry.file).suffix for entry in record.views.values()} == {".png"}
    with Image.open(tmp_path / "out" / items[0].name / record.views["CAM_FRONT"].file) as picture:
        assert picture.size == (1600, 900)


def test_frames_can_be_written_losslessly(made: Path, items: list[Item], project: Path, tmp_path: Path) -> None:
    config = small_config("video.format=png")
    generate_items(config, items[:1], project / STAGE, tmp_path, project=project)
    record, encoded = ItemRecord.read(tmp_path / items[0].name), ItemRecord.read(made / items[0].name)
    for view, entry in record.views.items():
        kept = list(read_view(tmp_path / record.name / entry.file))
        error = np.mean(
            [
                (frame.astype(float) - other) ** 2
                for frame, other in zip(kept, decode_video(made / record.name / encoded.views[view].file), strict=True)
            ]
        )
        assert entry.psnr is None
        assert 10 * np.log10(255**2 / error) == pytest.approx(encoded.views[view].psnr, abs=0.01)
    assert record.faults(tmp_path / record.name) == []
    (tmp_path / record.name / record.views["CAM_BACK"].file / "000001.png").unlink()
    assert len(record.faults(tmp_path / record.name)) == 1


@pytest.mark.parametrize(("height", "width", "band"), [(224, 400, 4), (424, 800, 52), (848, 1600, 52), (112, 200, 4)])
def test_frames_become_full_size_images(height: int, width: int, band: int) -> None:
    picture = full_size_image(np.full((height, width, 3), 200, dtype=np.uint8))
    assert picture.shape == (900, 1600, 3)
    assert not picture[:band].any()
    assert (picture[band:] == 200).all()


def test_frames_taller_than_an_image_are_refused() -> None:
    with pytest.raises(MagicDriveError, match="taller than 900 rows"):
        full_size_image(np.zeros((300, 400, 3), dtype=np.uint8))
