"""Pictures as video frames, and messages about unusable pictures."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magicdrive_core.data.pictures import check_pictures, read_clip, read_picture
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry.cameras import Framing

SMALL = Framing(224, 400)


@pytest.fixture
def picture(synthetic_root: Path, scenes: list[Scene], tmp_path: Path) -> Path:
    path = tmp_path / "front.jpg"
    path.write_bytes((synthetic_root / scenes[0].pictures[0][1]).read_bytes())
    return path


def test_the_full_size_is_the_picture_without_its_top_rows(picture: Path) -> None:
    with Image.open(picture) as image:
        np.testing.assert_array_equal(read_picture(picture, Framing(848, 1600)), np.asarray(image)[52:])


def test_smaller_sizes_show_the_same_scene(picture: Path) -> None:
    whole, small = read_picture(picture, Framing(848, 1600)), read_picture(picture, SMALL)
    assert small.shape == (224, 400, 3)
    averaged = whole[-896:].astype(float)[-(848 // 4 * 4) :].reshape(212, 4, 400, 4, 3).mean((1, 3))
    assert np.abs(small[-212:] - averaged).mean() < 4


def test_a_clip_has_views_and_frames(synthetic_root: Path, scenes: list[Scene]) -> None:
    clip = read_clip(synthetic_root, scenes[0], Clip(scenes[0].token, 4, 2), "112x200")
    assert clip.shape == (6, 2, 112, 200, 3)
    path = synthetic_root / scenes[0].pictures[5][3]
    np.testing.assert_array_equal(clip[3, 1], read_picture(path, Framing(112, 200)))


def test_unusable_pictures_are_named(picture: Path, tmp_path: Path) -> None:
    whole = picture.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-500], b"", b"no picture"):
        picture.write_bytes(broken)
        with pytest.raises(MagicDriveError, match=r"front.jpg is not a complete picture"):
            read_picture(picture, SMALL)
    with pytest.raises(MagicDriveError, match=r"gone.jpg is missing"):
        read_picture(tmp_path / "gone.jpg", SMALL)


def test_pictures_of_another_aspect_ratio_show_their_centre(tmp_path: Path) -> None:
    path = tmp_path / "tall.png"
    tall = np.zeros((2048, 1550, 3), np.uint8)
    tall[588:1460] = 200  # 1550 * 9 / 16 = 872 central rows
    Image.fromarray(tall).save(path)
    seen = read_picture(path, SMALL)
    assert seen.shape == (224, 400, 3)
    assert (seen[3:-3] == 200).all()
    Image.fromarray(tall[:872]).resize((800, 450)).save(path)  # 16:9 but smaller: nothing is cut
    assert read_picture(path, SMALL).shape == (224, 400, 3)


@pytest.mark.parametrize("size", [(112, 200), (224, 400), (424, 800)])
def test_scaled_decoding_agrees_with_full_decoding_to_50_db(shared: Path, size: tuple[int, int]) -> None:
    """Six real pictures; at 424x800 twice the size is the full size, so that nothing is scaled."""
    errors = []
    for path in sorted((shared / "data/nuscenes-one/samples").glob("CAM_*/*.jpg")):
        whole, scaled = (read_picture(path, Framing(*size), scaled=flag).astype(float) for flag in (False, True))
        errors.append(np.mean((whole - scaled) ** 2))
        assert np.abs(whole - scaled).max() <= 8
    assert len(errors) == 6
    assert 10 * np.log10(255**2 / max(np.mean(errors), 1e-9)) >= 49


def test_more_rows_than_a_picture_has_are_refused(picture: Path) -> None:
    with pytest.raises(UsageError, match="size 96x168: a picture has 94 rows at that width"):
        read_picture(picture, Framing(96, 168))


def test_sixteen_bit_greys_keep_their_brightness(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 1600).astype(np.uint16), (900, 1))
    path = tmp_path / "grey.png"
    Image.fromarray(ramp).save(path)
    seen = read_picture(path, Framing(848, 1600))
    np.testing.assert_array_equal(seen[..., 0], seen[..., 2])
    assert np.abs(seen[0, :, 0] - np.linspace(0, 255, 1600)).max() <= 1


def test_only_jpeg_and_png_are_opened_whatever_a_file_is_called(tmp_path: Path) -> None:
    """EPS would be given to Ghostscript."""
    for form in ("EPS", "TIFF", "GIF"):
        path = tmp_path / f"{form}.jpg"
        Image.new("RGB", (1600, 900)).save(path, format=form)
        with pytest.raises(MagicDriveError, match=rf"{form}.jpg is not a complete picture"):
            read_picture(path, SMALL)
        assert check_pictures(tmp_path, {path.name: (1600, 900)}) == [f"{path} is not a JPEG or PNG picture"]


def test_bombs_and_pipes_are_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))))
    with pytest.raises(MagicDriveError, match=r"bomb.png is not a complete picture"):
        read_picture(bomb, SMALL)
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(MagicDriveError, match=r"pipe.jpg is not a regular file"):
        read_picture(pipe, SMALL)
    assert len(check_pictures(tmp_path, {"pipe.jpg": (1, 1), "bomb.png": (1, 1)})) == 2
