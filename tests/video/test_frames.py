"""Frames as PNG files are lossless, sorted by their numbers, and can be encoded as a video."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from magicdrive_core.cli.main import main as cli
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.video.decoder import decode_video, probe
from magicdrive_core.video.frames import frame_files, read_frame, read_view, write_frames

FRAMES = [np.full((64, 96, 3), 12 * n, dtype=np.uint8) for n in range(12)]


def fails(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli(["video", "from-frames", *words])
    return int(ended.value.code or 0)


def test_frames_come_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (18, 32, 3), dtype=np.uint8) for _ in range(3)]
    write_frames(iter(frames), tmp_path / "view")
    for before, after in zip(frames, read_view(tmp_path / "view"), strict=True):
        assert np.array_equal(before, after)
    assert next(read_view(tmp_path / "view", (9, 16))).shape == (9, 16, 3)


def test_numbers_order_the_files(tmp_path: Path) -> None:
    for name in ("frame_10.png", "frame_9.PNG", "frame_100.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in frame_files(tmp_path)] == ["frame_9.PNG", "frame_10.png", "frame_100.png"]


def test_the_command_trims_both_ends_and_tags_the_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_frames(FRAMES, tmp_path / "in")
    out = tmp_path / "out.mp4"
    assert (
        fails(str(tmp_path / "in"), str(out), "--head", "3", "--tail", "2", "--fps", "10", "--max-mbit-s", "0.5") == 0
    )
    assert "7 frames" in capsys.readouterr().out
    info = probe(out)
    assert (info.frames, info.fps, info.height, info.width) == (7, 10.0, 64, 96)
    assert info.mbit_s <= 0.5
    assert [round(float(frame.mean()) / 12) for frame in decode_video(out)] == list(range(3, 10))
    with av.open(str(out)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_range, context.colorspace) == (ColorRange.MPEG, Colorspace.ITU709)
        assert (context.color_primaries, context.color_trc) == (1, 1)  # BT.709


def test_a_bad_input_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", str(tmp_path / "out.mp4")
    write_frames(FRAMES[:2], folder)
    cases = [
        (([str(tmp_path / "none"), out]), 1, "none is not a folder"),
        (([str(tmp_path), out]), 1, "holds no PNG frames"),
        (([str(folder), str(tmp_path / "out.avi")]), 2, "does not end with .mp4"),
        (([str(folder), out, "--head", "1", "--tail", "1"]), 2, "leave none"),
    ]
    for words, code, message in cases:
        assert fails(*words) == code
        assert message in capsys.readouterr().err
    (folder / "000001.png").write_bytes((folder / "000001.png").read_bytes()[:60])
    assert fails(str(folder), out) == 1
    assert "000001.png cannot be read as a PNG image" in capsys.readouterr().err
    assert not Path(out).exists()


def test_images_that_cannot_be_frames_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(MagicDriveError, match="mode I;16"):
        read_frame(tmp_path / "deep.png")
    Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read_frame(tmp_path / "grey.png").shape == (4, 4, 3)
