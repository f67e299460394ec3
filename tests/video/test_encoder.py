"""The cap holds on the file for any content, and decoding returns the written frames."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video import encoder
from magicdrive_core.video.colour import ColourConverter
from magicdrive_core.video.decoder import decode_video, probe
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.palette import font
from tests.conftest import PROJECT

Picture = NDArray[np.uint8]


def noise(frames: int, height: int, width: int) -> Iterator[Picture]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(frames))


def street(frames: int, height: int = 180, width: int = 320) -> list[Picture]:
    """Gradients and letters that move."""
    out = []
    for n in range(frames):
        sky = np.linspace(200, 90, height)[:, None] + np.linspace(0, 40, width)[None]
        image = Image.fromarray(np.stack([sky * 0.7, sky * 0.85, sky], axis=-1).astype(np.uint8))
        ImageDraw.Draw(image).text((20 + 4 * n, height // 2), "TAXI 42", fill=(250, 200, 40), font=font(height // 6))
        out.append(np.asarray(image))
    return out


def test_white_noise_of_full_size_stays_under_the_cap(tmp_path: Path) -> None:
    made = encode_video(
        noise(16, 900, 1600), tmp_path / "a.mp4", fps=12, max_mbit_s=4.0, start=44.0, preset="ultrafast"
    )
    measured = (tmp_path / "a.mp4").stat().st_size * 8 / (16 / 12) / 1e6
    assert measured <= 4.0
    assert made.mbit_s == pytest.approx(measured)
    assert measured > 0.9 * 4.0  # the cap is used, not merely kept


@pytest.mark.parametrize(("frames", "cap"), [(1, 2.0), (2, 1.0), (16, 0.4), (16, 0.1), (49, 0.05)])
def test_small_clips_stay_under_any_cap(tmp_path: Path, frames: int, cap: float) -> None:
    made = encode_video(street(frames), tmp_path / "a.mp4", fps=12, max_mbit_s=cap)
    assert made.path.stat().st_size * 8 * 12 / frames / 1e6 <= cap


def test_more_bits_never_look_worse(tmp_path: Path) -> None:
    grain = np.random.default_rng(0).integers(0, 24, (8, 180, 320, 1), dtype=np.uint8)
    frames = [frame // 2 + grey for frame, grey in zip(street(8), grain, strict=True)]
    psnrs = [encode_video(frames, tmp_path / "a.mp4", fps=12, max_mbit_s=cap).psnr for cap in (0.15, 0.4, 1.0, 2.5)]
    assert psnrs == sorted(psnrs)
    assert psnrs[-1] > psnrs[0] + 6


def test_content_that_needs_few_bits_is_nearly_lossless(tmp_path: Path) -> None:
    grey = [np.repeat(frame.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2) for frame in street(16)]
    made = encode_video(grey, tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    assert made.psnr > 44
    assert made.mbit_s < 1


def test_colours_lose_little_beyond_what_their_format_does(tmp_path: Path) -> None:
    frames, colours = street(16), ColourConverter()
    made = encode_video(frames, tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    error = np.mean([(frame - colours.to_rgb(colours.to_yuv(frame)).astype(float)) ** 2 for frame in frames])
    assert made.psnr > 10 * np.log10(255**2 / error) - 3  # at most as much again


def test_a_cap_that_no_quality_meets_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"4 frames of 320x180 cannot be encoded at 0\.02 Mbit/s"):
        encode_video(noise(4, 180, 320), tmp_path / "a.mp4", fps=12, max_mbit_s=0.02)
    assert list(tmp_path.iterdir()) == []


def test_without_a_cap_the_encoder_decides(tmp_path: Path) -> None:
    free, capped = (encode_video(noise(4, 180, 320), tmp_path / "a.mp4", fps=12, max_mbit_s=cap) for cap in (None, 1.0))
    assert free.mbit_s > 2 * capped.mbit_s
    assert capped.mbit_s <= 1


def test_decoding_gives_the_measured_frames_back(tmp_path: Path) -> None:
    frames = street(9)
    made = encode_video(iter(frames), tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    decoded = list(decode_video(made.path))
    assert len(decoded) == made.frames == 9
    error = np.mean([(a.astype(float) - b) ** 2 for a, b in zip(frames, decoded, strict=True)])
    assert 10 * np.log10(255**2 / error) == pytest.approx(made.psnr, abs=0.01)


def test_frames_keep_their_order(tmp_path: Path) -> None:
    frames = [np.full((64, 64, 3), 12 * n, dtype=np.uint8) for n in range(20)]
    made = encode_video(frames, tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    assert [round(float(frame.mean()) / 12) for frame in decode_video(made.path)] == list(range(20))


@pytest.mark.parametrize("cap", [4.0, 0.3, None])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, cap: float | None) -> None:
    digests = set()
    for name in ("a.mp4", "b.mp4"):
        encode_video(noise(6, 96, 160), tmp_path / name, fps=12, max_mbit_s=cap)
        digests.add(sha256_file(tmp_path / name))
    assert len(digests) == 1


def test_later_passes_read_frames_that_were_too_many_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode() -> str:
        return sha256_file(encode_video(noise(6, 96, 160), tmp_path / "a.mp4", fps=12, max_mbit_s=0.3).path)

    in_memory = encode()
    monkeypatch.setattr(encoder, "MEMORY_BYTES", 1000)
    assert encode() == in_memory


def test_colours_are_tagged_and_come_back(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 140, 200)]
    picture = np.repeat(np.repeat(np.array([colours], dtype=np.uint8), 64, axis=0), 32, axis=1)
    made = encode_video([picture] * 2, tmp_path / "a.mp4", fps=12, max_mbit_s=None)
    with av.open(str(made.path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.format.name) == (1, 1, "yuv420p")  # BT.709, limited
        luma = np.frombuffer(frame.planes[0], dtype=np.uint8).reshape(64, -1)
    assert [int(luma[32, 16 + 32 * n]) for n in range(6)] == pytest.approx([63, 173, 32, 235, 16, 133], abs=2)
    decoded = next(decode_video(made.path))
    for n, colour in enumerate(colours):
        assert decoded[32, 16 + 32 * n] == pytest.approx(colour, abs=6)


def test_the_index_precedes_the_data(tmp_path: Path) -> None:
    data = encode_video(street(2), tmp_path / "a.mp4", fps=12, max_mbit_s=4.0).path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_unusable_frames_are_refused(tmp_path: Path) -> None:
    grey = np.zeros((64, 64, 3), dtype=np.uint8)
    for frames, message in (
        ([], "at least one frame"),
        ([grey[:63]], "even width and height"),
        ([grey, grey[:32]], "frame 1 is"),
        ([grey.astype(np.float32)], "frame 0 is float32"),
    ):
        with pytest.raises(UsageError, match=message):
            encode_video(frames, tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    assert list(tmp_path.iterdir()) == []


def test_probe_measures_the_file(tmp_path: Path) -> None:
    made = encode_video(street(7), tmp_path / "a.mp4", fps=10, max_mbit_s=4.0)
    info = probe(made.path)
    assert (info.frames, info.fps, info.height, info.width, info.codec) == (7, 10.0, 180, 320, "h264")
    assert info.bytes == made.bytes
    assert info.mbit_s == pytest.approx(made.mbit_s)


def test_a_file_that_is_not_a_video_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing of the kind" * 100)
    for read in (probe, lambda path: next(decode_video(path))):
        with pytest.raises(MagicDriveError, match="cannot be read as a video"):
            read(tmp_path / "a.mp4")
        with pytest.raises(MagicDriveError, match="cannot be read as a video"):
            read(tmp_path / "missing.mp4")


def test_broken_data_is_not_concealed(tmp_path: Path) -> None:
    data = bytearray(encode_video(noise(16, 96, 160), tmp_path / "a.mp4", fps=12, max_mbit_s=2.0).path.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(MagicDriveError, match="cannot be read as a video"):
        list(decode_video(tmp_path / "a.mp4"))


def test_a_frame_that_claims_too_much_memory_is_refused(tmp_path: Path) -> None:
    made = encode_video(street(2), tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    with pytest.raises(MagicDriveError, match="cannot be read as a video"):
        next(decode_video(made.path, max_pixels=1000))


def test_frames_can_be_scaled_while_they_are_decoded(tmp_path: Path) -> None:
    made = encode_video(street(2), tmp_path / "a.mp4", fps=12, max_mbit_s=4.0)
    small = next(decode_video(made.path, size=(90, 160)))
    expected = np.asarray(Image.fromarray(next(decode_video(made.path))).resize((160, 90), Image.Resampling.BICUBIC))
    assert small.shape == (90, 160, 3)
    assert np.abs(small.astype(int) - expected).mean() < 2


def test_what_lies_in_memory_does_not_change_the_bytes_of_a_video(tmp_path: Path) -> None:
    """Each process fills its memory with other bytes before x264 gets it, and encodes three videos at once."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from magicdrive_core.video.encoder import encode_video
from tests.experiment.probes import moving_picture
frames = list(moving_picture(16, 80, 144))
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda n: encode_video(frames, f"{sys.argv[1]}-{n}.mp4", fps=12, max_mbit_s=4.0), range(3)))
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / str(filling))],
            env=os.environ | {"MALLOC_PERTURB_": str(filling)},
            cwd=PROJECT,
        )
        for filling in (37, 148)
    ]
    assert [child.wait() for child in children] == [0, 0]
    videos = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(videos) == 6
    assert len(set(videos)) == 1
