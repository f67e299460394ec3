"""Every way in which a submission can be wrong has a line of its own."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from copy import copy
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from magicdrive_core.video.encoder import encode_video
from magicdrive_core.wcoda.package import pack
from magicdrive_core.wcoda.submission import Expected
from magicdrive_core.wcoda.validator import LARGEST_VIDEO, validate
from tests.evaluation.stand_in import HEIGHT, SAMPLES, WIDTH, config, write_item

EXPECTED = Expected(scenes=2, generations=2, height=HEIGHT, width=WIDTH)
ITEM = f"owls_standard/{SAMPLES[0]}_gen0"
FRONT = f"{ITEM}/{SAMPLES[0]}_CAM_FRONT.mp4"

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    for sample in SAMPLES:
        for generation in range(2):
            write_item(folder / "generated", sample, generation)
    return pack(config(), folder / "generated", folder / "out").zip_path


@pytest.fixture(scope="module")
def files(right: Path) -> Files:
    with zipfile.ZipFile(right) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, files: Files, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def video(folder: Path, frames: int = 16, fps: int = 12, height: int = HEIGHT, noise: bool = False) -> bytes:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (height, WIDTH, 3), dtype=np.uint8) * (1 if noise else 0) for _ in range(frames)]
    return encode_video(pictures, folder / "video.mp4", fps=fps, max_mbit_s=None).path.read_bytes()


def other_codec(folder: Path) -> bytes:
    with av.open(str(folder / "other.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(16):
            picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return (folder / "other.mp4").read_bytes()


def uneven(folder: Path) -> bytes:
    """Returns a video of 16 frames in as much time as 16 even ones take; one of them is late."""
    with av.open(str(folder / "uneven.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 120)
        for index in range(16):
            frame = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = 10 * index + 5 * (index == 5), Fraction(1, 120)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return (folder / "uneven.mp4").read_bytes()


def test_a_right_package_has_no_fault(right: Path) -> None:
    assert validate(right, EXPECTED) == []
    assert validate(right, Expected(height=HEIGHT, width=WIDTH)) == []  # counts from the zip itself


def test_the_official_size_is_the_default(right: Path) -> None:
    faults = validate(right)
    assert len(faults) == 24
    assert faults[0].endswith(f"{WIDTH}x{HEIGHT}, not 1600x900")


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (lambda f, t: f.pop(FRONT), [f"{SAMPLES[0]}_gen0: CAM_FRONT is missing"]),
        (
            lambda f, t: [f.pop(name) for name in list(f) if name.startswith(f"{ITEM}/")],
            [f"{SAMPLES[0]}_gen0: missing"],
        ),
        (
            lambda f, t: [f.pop(name) for name in list(f) if SAMPLES[1] in name],
            ["1 scenes, 2 expected"],
        ),
        (
            lambda f, t: f.update({f"{ITEM}/{SAMPLES[0]}_CAM_TOP.mp4": f[FRONT]}),
            [f"{SAMPLES[0]}_gen0/{SAMPLES[0]}_CAM_TOP.mp4: not one of the six views"],
        ),
        (
            lambda f, t: f.update({"readme.txt": b"hello"}),
            ["readme.txt: not of the form team_standard/token_genN/token_VIEW.mp4"],
        ),
        (
            lambda f, t: f.update({FRONT.replace("owls", "hawks"): f.pop(FRONT)}),
            ["folders of 2 teams: hawks, owls"],
        ),
        (
            lambda f, t: f.update({FRONT: video(t, frames=15)}),
            [f"{FRONT}: 15 frames, not 16"],
        ),
        (
            lambda f, t: f.update({FRONT: video(t, frames=9)}),
            [f"{FRONT}: 9 frames, not 16", f"{FRONT}: key frame 12 cannot be extracted"],
        ),
        (
            lambda f, t: f.update({FRONT: video(t, frames=20)}),
            [f"{FRONT}: 20 frames, not 16"],
        ),
        (
            lambda f, t: f.update({FRONT: video(t, fps=10)}),
            [f"{FRONT}: 10 frames per second, not 12"],
        ),
        (
            lambda f, t: f.update({FRONT: video(t, height=HEIGHT - 2)}),
            [f"{FRONT}: {WIDTH}x{HEIGHT - 2}, not {WIDTH}x{HEIGHT}"],
        ),
        (lambda f, t: f.update({FRONT: other_codec(t)}), [f"{FRONT}: codec mpeg4, not h264"]),
        (lambda f, t: f.update({FRONT: uneven(t)}), [f"{FRONT}: frames at uneven times"]),
        (lambda f, t: f.update({FRONT: b"no video at all" * 50}), [f"{FRONT}: cannot be read as a video"]),
    ],
)
def test_each_fault_has_its_line(
    files: Files, tmp_path: Path, change: Callable[[Files, Path], object], faults: list[str]
) -> None:
    changed = dict(files)
    change(changed, tmp_path)
    found = validate(zipped(tmp_path / "results.zip", changed), EXPECTED)
    for fault in faults:
        assert any(line.startswith(fault) for line in found), found
    assert len(found) == len(faults)
    assert all("\n" not in line for line in found)


def test_a_video_that_ends_too_soon_is_found(files: Files, tmp_path: Path) -> None:
    cut = {**files, FRONT: files[FRONT][: len(files[FRONT]) // 2]}
    found = validate(zipped(tmp_path / "results.zip", cut), EXPECTED)
    assert found
    assert all(line.startswith(f"{FRONT}: ") for line in found)


def test_every_fault_is_found_at_once(files: Files, tmp_path: Path) -> None:
    changed = dict(files)
    changed.pop(FRONT)
    changed[FRONT.replace("FRONT", "BACK")] = b"?"
    changed[f"owls_standard/{SAMPLES[1]}_gen1/{SAMPLES[1]}_CAM_BACK.mp4"] = video(tmp_path, frames=15)
    assert len(validate(zipped(tmp_path / "results.zip", changed), EXPECTED)) == 3


def test_the_cap_is_measured_on_the_file(files: Files, tmp_path: Path) -> None:
    loud = {**files, FRONT: video(tmp_path, noise=True)}
    path = zipped(tmp_path / "results.zip", loud)
    strict = Expected(scenes=2, generations=2, height=HEIGHT, width=WIDTH, max_mbit_s=0.5)
    (fault,) = validate(path, strict)
    assert fault.startswith(f"{FRONT}: ")
    assert fault.endswith(" Mbit/s, the cap is 0.5")
    assert validate(path, Expected(2, 2, height=HEIGHT, width=WIDTH, max_mbit_s=None)) == []


@pytest.mark.parametrize("name", ["../evil.mp4", "/etc/evil.mp4", "owls_standard/../../evil.mp4", "C:\\evil.mp4"])
def test_paths_that_lead_out_are_refused(files: Files, tmp_path: Path, name: str) -> None:
    found = validate(zipped(tmp_path / "results.zip", {**files, name: b"x"}), EXPECTED)
    assert found == [f"{name}: the path leads outside the folder"]


def test_links_are_refused(files: Files, tmp_path: Path) -> None:
    path = zipped(tmp_path / "results.zip", files)
    link = zipfile.ZipInfo(FRONT.replace("FRONT", "LINK"))
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert validate(path, EXPECTED) == [f"{link.filename}: a link or device, not a file"]


def test_bombs_are_refused_before_they_are_unpacked(files: Files, tmp_path: Path) -> None:
    bomb = {**files, FRONT: bytes(20 * 2**20)}
    (fault,) = validate(zipped(tmp_path / "results.zip", bomb, zipfile.ZIP_DEFLATED), EXPECTED)
    assert "no video shrinks like that" in fault
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        archive.writestr(FRONT, bytes(LARGEST_VIDEO + 1))
    (fault,) = validate(tmp_path / "large.zip", EXPECTED)
    assert "a video has at most" in fault


def test_entries_that_share_their_bytes_are_refused(files: Files, tmp_path: Path) -> None:
    """A bomb that no single entry betrays: a hundred names for one video."""
    path = zipped(tmp_path / "results.zip", files)
    with zipfile.ZipFile(path, "a") as archive:
        video = archive.getinfo(FRONT)
        for n in range(100):
            twin = copy(video)
            twin.filename = f"owls_standard/{n}_gen0/{n}_CAM_FRONT.mp4"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]  # writes the index anew
    (fault,) = validate(path, EXPECTED)
    assert "they overlap" in fault


def test_a_name_with_line_breaks_stays_on_its_line(files: Files, tmp_path: Path) -> None:
    found = validate(zipped(tmp_path / "results.zip", {**files, "a\n\x1b[2Jb.mp4": b"x"}), EXPECTED)
    assert found == [r"a\x0a\x1b[2Jb.mp4: not of the form team_standard/token_genN/token_VIEW.mp4"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(files: Files, tmp_path: Path) -> None:
    path = zipped(tmp_path / "results.zip", files)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(FRONT, b"other")
    assert validate(path, EXPECTED) == [f"{FRONT}: twice in the zip"]


def test_damaged_archives_are_faults_not_crashes(files: Files, tmp_path: Path) -> None:
    path = zipped(tmp_path / "results.zip", files)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(FRONT).header_offset
    data[offset + 400] ^= 0xFF  # in the first file's own bytes: its check sum is wrong
    path.write_bytes(data)
    (fault,) = validate(path, EXPECTED)
    assert fault.startswith(f"{FRONT}: cannot be unpacked: Bad CRC-32")
    path.write_bytes(data[: len(data) // 2])
    (fault,) = validate(path, EXPECTED)
    assert "not a readable zip" in fault
    (fault,) = validate(tmp_path / "none.zip", EXPECTED)
    assert fault.endswith("missing")


def test_an_empty_zip_is_no_submission(tmp_path: Path) -> None:
    assert validate(zipped(tmp_path / "results.zip", {}), Expected()) == ["no video in the zip"]
