"""Round 2's long videos: ``{team}_long/{token}_{weather}/{token}_{VIEW}.mp4``, the sunny ones with round 1's frames.

The sunny video must begin with exactly the frames of round 1. Frames that are encoded twice are never exactly the same,
so that the packaged video of round 1 is its head as it stands, and only what follows is encoded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from itertools import islice
from math import log10
from pathlib import Path

import numpy as np

from magicdrive_core.config.schema import Config
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video.decoder import mbit_per_second, probe
from magicdrive_core.video.encoder import encode_video, join_videos
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord, ViewFile, read_items
from magicdrive_core.wcoda.submission import WEATHERS

SAME_CLIP = 20.0  # dB between two encodings of one picture at the least; other pictures of a scene have 10 to 15
HEADROOM = 0.99  # of the cap, for what follows the head: parameter sets stand before each of its key frames


def read_long(config: Config, standard: Sequence[ItemRecord], project: Path) -> dict[str, dict[str, ItemRecord]]:
    """The first generation of the scenes that the long set is made of, by weather, by sample token.

    Args:
        config: ``submission.long`` names the folders of items.
        standard: the items of the standard set.
        project: the project's folder.

    Raises:
        MagicDriveError: the weathers hold different scenes, too few, too short ones, or ones without a standard clip.
    """
    folders = config.submission.long
    if folders is None:
        return {}
    sets = {
        weather: {r.sample: r for r in read_items(project / folders.of(weather)) if r.generation == 0}
        for weather in WEATHERS
    }
    tokens = set.intersection(*(set(records) for records in sets.values()))
    if len(tokens) != config.submission.long_scenes:
        raise MagicDriveError(
            f"submission.long: {len(tokens)} scenes stand in all of sunny, rainy and night, "
            f"{config.submission.long_scenes} are wanted",
            "generate the same scenes in each weather, or set submission.long_scenes",
        )
    known = {record.sample for record in standard}
    for weather, records in sets.items():
        for token in sorted(tokens):
            record, folder = records[token], project / folders.of(weather) / records[token].name
            faults = [f"{view} is missing" for view in VIEWS if view not in record.views] + record.faults(folder)
            if record.frames < config.submission.frames:
                faults.append(f"{record.frames} frames, fewer than round 1's {config.submission.frames}")
            if token not in known:
                faults.append("the standard set has no such scene")
            if faults:
                raise MagicDriveError(f"{folder}: {faults[0]}", "generate the clip again")
    return {weather: {token: records[token] for token in sorted(tokens)} for weather, records in sets.items()}


def place_long(
    config: Config, record: ItemRecord, view: str, source: Path, target: Path, head: tuple[Path, float | None] | None
) -> tuple[ViewFile, bool]:
    """Puts one view's long video at ``target``.

    Args:
        config: frame rate, cap, and the frames of round 1.
        record: of the long clip.
        view: one of its six.
        source: the item's folder.
        target: the file to write.
        head: the packaged video of round 1 and its PSNR, where the long one begins with it.

    Returns:
        the file as measured, and whether anything was encoded for it.

    Raises:
        MagicDriveError: the clip does not begin with round 1's pictures, or the cap cannot be kept.
    """
    entry, video, wanted = record.views[view], config.video, config.submission.frames
    path = source / entry.file
    if head is None and not path.is_dir():
        shutil.copyfile(path, target)
        return ViewFile(target.name, entry.sha256, entry.bytes, entry.mbit_s, entry.psnr), False
    if head is None:
        made = encode_video(read_view(path), target, fps=video.fps, max_mbit_s=video.max_mbit_s)
        return ViewFile(target.name, sha256_file(target), made.bytes, made.mbit_s, made.psnr), True
    _check_beginning(record, view, path, head[0])
    if record.frames == wanted:
        shutil.copyfile(head[0], target)
        psnr = head[1]
    else:
        cap = None if video.max_mbit_s is None else HEADROOM * video.max_mbit_s
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            rest = Path(folder, "rest.mp4")
            made = encode_video(islice(read_view(path), wanted, None), rest, fps=video.fps, max_mbit_s=cap)
            join_videos([head[0], rest], target)
        psnr = _mean_psnr([(wanted, head[1]), (made.frames, made.psnr)])
    frames = probe(target).frames
    rate = mbit_per_second(target.stat().st_size, frames, video.fps)
    if video.max_mbit_s is not None and rate > video.max_mbit_s:
        raise MagicDriveError(
            f"{target.name}: {rate:.3f} Mbit/s with round 1's frames before it, the cap is {video.max_mbit_s:g}",
            "generate a longer clip: the key frames of a few frames take too much",
        )
    return ViewFile(target.name, sha256_file(target), target.stat().st_size, rate, psnr), True


def _check_beginning(record: ItemRecord, view: str, path: Path, head: Path) -> None:
    """The first pictures of both are one and the same, but for encoding."""
    (ours,), (theirs,) = (list(islice(read_view(file), 1)) for file in (path, head))
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2)) if ours.shape == theirs.shape else 255.0**2
    if error > 255.0**2 / 10 ** (SAME_CLIP / 10):
        raise MagicDriveError(
            f"{record.name}, {view}: the sunny clip does not begin with the frames of round 1",
            "generate it with the first frames of that clip given",
        )


def _mean_psnr(parts: Sequence[tuple[int, float | None]]) -> float | None:
    """PSNR of a whole in dB, from (frames, PSNR) of its parts; None where one of them is not known."""
    errors = [frames * 10 ** (-psnr / 10) for frames, psnr in parts if psnr is not None]
    return round(-10 * log10(sum(errors) / sum(n for n, _ in parts)), 3) if len(errors) == len(parts) else None
