"""Round 2's long videos: ``{team}_long/{token}_{weather}/{token}_{VIEW}.mp4``, the sunny ones with round 1's frames.

The sunny video must start with exactly the frames of round 1. Encoding frames again changes them, so the packaged video
of round 1 is copied as the head of the long one, and only the frames after it are encoded.
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
    """Read the items of the long set: the first generation of each scene.

    Args:
        config: All settings; ``submission.long`` names the folders of items.
        standard: Items of the standard set.
        project: The project's folder.

    Returns:
        Items by weather, then by sample token.

    Raises:
        MagicDriveError: Weathers have different scenes, too few or too short ones, or a scene has no standard clip.
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
            f"submission.long: {len(tokens)} scenes are in all of sunny, rainy and night, "
            f"{config.submission.long_scenes} are needed",
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
    """Write the long video of one view.

    Args:
        config: All settings; frame rate, cap on the bit rate and frames of round 1 are used.
        record: Record of the long clip.
        view: One of the six views.
        source: The item's folder.
        target: The file to write.
        head: Packaged video of round 1 and its PSNR if the long video starts with it, else None.

    Returns:
        The measured file, and whether anything was encoded for it.

    Raises:
        MagicDriveError: The clip does not start with the frames of round 1, or the cap cannot be kept.
    """
    entry, video, wanted = record.views[view], config.video, config.submission.frames
    path = source / entry.file
    if head is None and not path.is_dir():
        shutil.copyfile(path, target)
        return ViewFile(target.name, entry.sha256, entry.bytes, entry.mbit_s, entry.psnr), False
    if head is None:
        made = encode_video(read_view(path), target, fps=video.fps, max_mbit_s=video.max_mbit_s)
        return ViewFile(target.name, sha256_file(target), made.bytes, made.mbit_s, made.psnr), True
    _check_head(record, view, path, head[0])
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
            f"{target.name}: {rate:.3f} Mbit/s including round 1's frames, the cap is {video.max_mbit_s:g}",
            "generate a longer clip: in a short one, key frames take too much of the bit rate",
        )
    return ViewFile(target.name, sha256_file(target), target.stat().st_size, rate, psnr), True


def _check_head(record: ItemRecord, view: str, path: Path, head: Path) -> None:
    """Check that the first frames of both videos are the same picture, apart from encoding."""
    (ours,), (theirs,) = (list(islice(read_view(file), 1)) for file in (path, head))
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2)) if ours.shape == theirs.shape else 255.0**2
    if error > 255.0**2 / 10 ** (SAME_CLIP / 10):
        raise MagicDriveError(
            f"{record.name}, {view}: the sunny clip does not start with the frames of round 1",
            "generate it with generate.initial_frames set to the standard clips",
        )


def _mean_psnr(parts: Sequence[tuple[int, float | None]]) -> float | None:
    """Combine (frames, PSNR in dB) of parts to the PSNR of the whole; None if one is unknown."""
    errors = [frames * 10 ** (-psnr / 10) for frames, psnr in parts if psnr is not None]
    return round(-10 * log10(sum(errors) / sum(n for n, _ in parts)), 3) if len(errors) == len(parts) else None
