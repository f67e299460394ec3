"""The long set: sunny, rainy and night, where the sunny videos begin with round 1's frames to the bit."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from magicdrive_core.config.schema import Config
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.video.decoder import decode_video, probe
from magicdrive_core.video.encoder import encode_video, join_videos
from magicdrive_core.wcoda.package import pack
from magicdrive_core.wcoda.submission import WEATHERS, Expected
from magicdrive_core.wcoda.validator import validate
from tests.evaluation.stand_in import HEIGHT, SAMPLES, WIDTH, config, write_item

EXPECTED = Expected(1, 1, 1, height=HEIGHT, width=WIDTH)
SUNNY = f"owls_long/{SAMPLES[0]}_sunny/{SAMPLES[0]}_CAM_FRONT.mp4"


def settings(folder: Path, *overrides: str) -> Config:
    folders = ", ".join(f"{weather}: {folder / weather}" for weather in WEATHERS)
    return config("generate.generations=1", f"submission.long={{{folders}}}", "submission.long_scenes=1", *overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_item(folder / "generated")
    for weather in WEATHERS:
        write_item(folder / weather, frames=25)
    pack(settings(folder), folder / "generated", folder / "out")
    return folder


@pytest.fixture(scope="module")
def files(made: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(made / "out/results.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_both_sets_stand_in_one_valid_zip(made: Path, files: dict[str, bytes]) -> None:
    token = SAMPLES[0]
    long = {f"owls_long/{token}_{weather}/{token}_{view}.mp4" for weather in WEATHERS for view in VIEWS}
    assert set(files) == long | {f"owls_standard/{token}_gen0/{token}_{view}.mp4" for view in VIEWS}
    assert validate(made / "out/results.zip", EXPECTED) == []


def test_the_sunny_video_is_round_one_and_what_follows(made: Path) -> None:
    first = list(decode_video(made / f"out/owls_standard/{SAMPLES[0]}_gen0/{SAMPLES[0]}_CAM_FRONT.mp4"))
    whole = list(decode_video(made / "out" / SUNNY))
    item = list(decode_video(made / f"sunny/{SAMPLES[0]}_gen0/{SAMPLES[0]}_CAM_FRONT.mp4"))
    assert len(whole) == 25
    assert all(np.array_equal(a, b) for a, b in zip(first, whole, strict=False))
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(whole[16:], item[16:], strict=True)) <= 3
    info = probe(made / "out" / SUNNY)
    assert (info.frames, info.fps) == (25, 12)
    assert info.mbit_s <= 4.0


def test_joined_videos_are_what_they_were(tmp_path: Path) -> None:
    rng, parts = np.random.default_rng(1), []
    for n, cap in enumerate((4.0, 0.8, None)):  # of three qualities: three sets of parameters
        frames = [rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(5 + n)]
        parts.append(encode_video(frames, tmp_path / f"{n}.mp4", fps=12, max_mbit_s=cap).path)
    join_videos(parts, tmp_path / "all.mp4")
    before = [frame for part in parts for frame in decode_video(part)]
    after = list(decode_video(tmp_path / "all.mp4"))
    assert len(after) == 18
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    (tmp_path / "1.mp4").write_bytes(b"no video")
    with pytest.raises(MagicDriveError, match="cannot be joined"):
        join_videos(parts, tmp_path / "again.mp4")
    assert not (tmp_path / "again.mp4").exists()


def test_each_fault_of_the_long_set_has_its_line(files: dict[str, bytes], tmp_path: Path) -> None:
    token = SAMPLES[0]
    other = files[SUNNY.replace("CAM_FRONT", "CAM_BACK")]
    cases = {
        f"{SUNNY}: does not start with the 16 frames of owls_standard/": {**files, SUNNY: other},
        f"{token}_night: missing": {name: data for name, data in files.items() if "_night/" not in name},
        f"{token}_sunny: CAM_FRONT is missing": {name: data for name, data in files.items() if name != SUNNY},
        f"{token}_night: its views have 16 and 25 frames": {
            **files,
            SUNNY.replace("sunny", "night"): files[f"owls_standard/{token}_gen0/{token}_CAM_FRONT.mp4"],
        },
    }
    for fault, changed in cases.items():
        (found,) = validate(zipped(tmp_path / "results.zip", changed), EXPECTED)
        assert found.startswith(fault)
    two = validate(zipped(tmp_path / "results.zip", files), replace(EXPECTED, long_scenes=2))
    assert two == ["1 long scenes, 2 expected"]
    alone = {name: data for name, data in files.items() if name.startswith("owls_long/")}
    assert validate(zipped(tmp_path / "results.zip", alone), EXPECTED) == ["no video of the standard set in the zip"]


def test_clips_that_cannot_make_a_long_set_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match="1 scenes are in all of sunny, rainy and night, 3 are needed"):
        pack(settings(made, "submission.long_scenes=3"), made / "generated", tmp_path / "out")
    for weather in WEATHERS:
        shutil.copytree(made / weather, tmp_path / weather)
    other = write_item(tmp_path / "other", generation=9, frames=25)  # of another brightness
    shutil.rmtree(tmp_path / "sunny")
    shutil.copytree(tmp_path / "other" / other.name, tmp_path / "sunny" / f"{SAMPLES[0]}_gen0")
    replace(other, generation=0).write(tmp_path / "sunny" / f"{SAMPLES[0]}_gen0")
    with pytest.raises(MagicDriveError, match="does not start with the frames of round 1"):
        pack(settings(tmp_path), made / "generated", tmp_path / "out")
    shutil.rmtree(tmp_path / "night")
    write_item(tmp_path / "night", frames=9)
    with pytest.raises(MagicDriveError, match="9 frames, fewer than round 1's 16"):
        pack(settings(tmp_path), made / "generated", tmp_path / "out")
    assert not (tmp_path / "out/results.zip").exists()
