"""When an item counts as finished: its fingerprint, its bytes, and files that open as the record says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.inference import checked
from magicdrive_core.inference.items import is_done
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.frames import write_frames
from magicdrive_core.video.item_record import RECORD, ItemRecord, ViewFile
from tests.evaluation.stand_in import write_item

SIZE = (PICTURE_HEIGHT, PICTURE_WIDTH)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    return folder / write_item(folder, frames=2, size=SIZE).name


@pytest.fixture
def item(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def done(folder: Path) -> bool:
    return is_done(folder, f"{0:064x}")


def back(folder: Path) -> Path:
    return next(folder.glob("*_CAM_BACK.mp4"))


def truncated(folder: Path) -> None:
    path = back(folder)
    path.write_bytes(path.read_bytes()[:-20])


def swapped(folder: Path) -> None:
    """Replaces a video by a valid one of the same length."""
    shutil.copy(next(folder.glob("*_CAM_FRONT.mp4")), back(folder))


def five_views(folder: Path) -> None:
    """Leaves one view out of the record; its file stays."""
    values = json.loads((folder / RECORD).read_text())
    del values["views"]["CAM_BACK"]
    (folder / RECORD).write_text(json.dumps(values))


def half_a_record(folder: Path) -> None:
    (folder / RECORD).write_text('{"half": ')


@pytest.mark.parametrize("harm", [truncated, swapped, five_views, half_a_record, lambda folder: back(folder).unlink()])
def test_a_finished_item_has_the_wanted_fingerprint_and_the_recorded_bytes(
    item: Path, harm: Callable[[Path], None]
) -> None:
    assert done(item)
    assert not is_done(item, "another")
    assert not done(item.parent / "nothing")
    harm(item)
    assert not done(item)


def recorded(folder: Path, path: Path) -> None:
    """Records a file of CAM_BACK as if it were the one that was written."""
    values = json.loads((folder / RECORD).read_text())
    values["views"]["CAM_BACK"] |= {"file": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / RECORD).write_text(json.dumps(values))
    assert not ItemRecord.read(folder).faults(folder)


def video(folder: Path, frames: int = 2, fps: int = 12, size: tuple[int, int] = SIZE) -> Path:
    grey = np.zeros((*size, 3), dtype=np.uint8)
    return encode_video([grey] * frames, back(folder), fps=fps, max_mbit_s=4.0, preset="ultrafast").path


def first_frame_broken(folder: Path) -> Path:
    path = video(folder)
    data = path.read_bytes()
    begin = data.index(b"mdat") + 4
    path.write_bytes(data[:begin] + bytes(len(data) - begin))
    return path


@pytest.mark.parametrize(
    ("make", "right"),
    [
        (video, True),
        (lambda folder: video(folder, frames=3), False),
        (lambda folder: video(folder, fps=10), False),
        (lambda folder: video(folder, size=(90, 160)), False),
        (first_frame_broken, False),
    ],
)
def test_files_are_opened_even_if_the_record_agrees_with_their_bytes(
    item: Path, make: Callable[[Path], Path], right: bool
) -> None:
    recorded(item, make(item))
    assert done(item) is right


def test_unchanged_files_are_read_once_and_changed_ones_again(item: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = ItemRecord.read
    monkeypatch.setattr(ItemRecord, "read", lambda folder: reads.append(folder) or read(folder))
    assert all(done(item) for _ in range(3))
    assert len(reads) == 1
    assert not is_done(item, "another")
    os.utime(back(item))
    assert done(item)
    assert done(item)
    assert len(reads) == 3
    (item.parent / checked.FOLDER / f"{item.name}.json").write_text("[" * 100_000)
    assert done(item)
    truncated(item)
    assert not done(item)


def test_a_folder_that_cannot_be_written_is_checked_each_time(item: Path) -> None:
    (item.parent / checked.FOLDER).touch()  # no folder can be made there
    assert done(item)
    assert done(item)
    truncated(item)
    assert not done(item)


def test_png_frames_are_counted_and_opened(item: Path) -> None:
    record = ItemRecord.read(item)
    for view, entry in record.views.items():
        folder = (item / entry.file).with_suffix("")
        write_frames(np.zeros((2, *SIZE, 3), dtype=np.uint8), folder)
        record.views[view] = ViewFile.of_images(folder)
    record.write(item)
    assert done(item)
    (folder / "000001.png").unlink()
    record.views[view] = ViewFile.of_images(folder)
    record.write(item)
    assert not done(item)
