"""The package is exactly what the track asks for, and the same every time."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video.decoder import decode_video, probe
from magicdrive_core.video.frames import write_frames
from magicdrive_core.video.item_record import ViewFile
from magicdrive_core.wcoda.package import pack, read_package
from tests.evaluation.stand_in import SAMPLES, config, write_item


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated")
    for sample in SAMPLES:
        for generation in range(2):
            write_item(out, sample, generation)
    return out


@pytest.fixture
def generated(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "generated")
    return tmp_path / "generated"


def test_names_are_those_of_the_track(generated: Path, tmp_path: Path) -> None:
    package = pack(config(), generated, tmp_path / "out", {"git.commit": "c0ffee"})
    wanted = {f"owls_standard/{s}_gen{g}/{s}_{view}.mp4" for s in SAMPLES for g in range(2) for view in VIEWS}
    with zipfile.ZipFile(package.zip_path) as archive:
        assert set(archive.namelist()) == wanted
        assert len(archive.namelist()) == len(wanted)
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None
    assert {p.relative_to(tmp_path / "out").as_posix() for p in package.folder.rglob("*.mp4")} == wanted
    assert [(file.name in wanted, file.recoded) for file in package.files] == [(True, False)] * 24


def test_the_manifest_tells_digest_rate_and_origin(generated: Path, tmp_path: Path) -> None:
    package = pack(config(), generated, tmp_path / "out", {"git.commit": "c0ffee"})
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["lineage"]["git.commit"] == "c0ffee"
    assert manifest["lineage"]["items"][f"{SAMPLES[0]}_gen1"]["model"] == "ab" * 32
    assert manifest["zip_sha256"] == sha256_file(package.zip_path)
    for entry in manifest["files"]:
        path = tmp_path / "out" / entry["name"]
        assert entry["sha256"] == sha256_file(path)
        assert entry["bytes"] == path.stat().st_size
        assert entry["mbit_s"] == pytest.approx(probe(path).mbit_s)
        assert entry["psnr"] > 30
    assert read_package(tmp_path / "out") == package


def test_equal_videos_give_an_equal_zip(generated: Path, tmp_path: Path) -> None:
    first = pack(config(), generated, tmp_path / "a")
    second = pack(config(), generated, tmp_path / "b")
    assert sha256_file(first.zip_path) == sha256_file(second.zip_path)


def test_packing_again_does_nothing_until_something_changes(generated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package = pack(config(), generated, out)
    stamp = package.zip_path.stat().st_mtime_ns
    assert pack(config(), generated, out) == package
    assert package.zip_path.stat().st_mtime_ns == stamp
    package.zip_path.write_bytes(b"damaged")
    assert pack(config(), generated, out).sha256 == package.sha256 == sha256_file(package.zip_path)


def test_a_longer_clip_gives_its_head(generated: Path, tmp_path: Path) -> None:
    for folder in generated.iterdir():
        shutil.rmtree(folder)
    record = write_item(generated, frames=25)
    package = pack(config("generate.generations=1"), generated, tmp_path / "out")
    assert {file.recoded for file in package.files} == {True}
    name = f"owls_standard/{record.name}/{record.sample}_CAM_FRONT.mp4"
    head = list(decode_video(tmp_path / "out" / name))
    whole = list(decode_video(generated / record.name / record.views["CAM_FRONT"].file))
    assert len(head) == 16
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(head, whole, strict=False)) <= 3


def test_frames_that_were_kept_without_loss_are_encoded(generated: Path, tmp_path: Path) -> None:
    for folder in generated.iterdir():
        shutil.rmtree(folder)
    record = write_item(generated)
    folder = generated / record.name
    views = {}
    for view, entry in record.views.items():
        path = folder / Path(entry.file).stem
        write_frames(decode_video(folder / entry.file), path)
        (folder / entry.file).unlink()
        views[view] = ViewFile.of_images(path)
    replace(record, views=views).write(folder)
    package = pack(config("generate.generations=1"), generated, tmp_path / "out")
    assert {file.recoded for file in package.files} == {True}
    front = next(file for file in package.files if file.name.endswith("CAM_FRONT.mp4"))
    assert len(list(decode_video(tmp_path / "out" / front.name))) == 16
    assert front.mbit_s <= 4.0


def test_generations_that_are_no_longer_wanted_stay_out(generated: Path, tmp_path: Path) -> None:
    package = pack(config("generate.generations=1"), generated, tmp_path / "out")
    assert len(package.files) == 2 * 6


def test_incomplete_sets_are_refused(generated: Path, tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match="holds no generated clips"):
        pack(config(), tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(MagicDriveError, match="4 of 8 clips are not generated"):
        pack(config("generate.generations=4"), generated, tmp_path / "out")
    with pytest.raises(MagicDriveError, match=r"has 16 frame\(s\), a W-CODA video 24"):
        pack(config("submission.frames=24"), generated, tmp_path / "out")
    video = generated / f"{SAMPLES[0]}_gen0/{SAMPLES[0]}_CAM_BACK.mp4"
    video.write_bytes(video.read_bytes() + b"x")
    with pytest.raises(MagicDriveError, match=r"CAM_BACK: .* has changed since it was written"):
        pack(config(), generated, tmp_path / "out")
    video.unlink()
    with pytest.raises(MagicDriveError, match=r"CAM_BACK: .* is missing"):
        pack(config(), generated, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_single_frames_are_no_package(generated: Path, tmp_path: Path) -> None:
    write_item(tmp_path / "stills", frames=1)
    with pytest.raises(MagicDriveError, match=r"has 1 frame\(s\), a W-CODA video 16"):
        pack(config("generate.generations=1"), tmp_path / "stills", tmp_path / "out")
