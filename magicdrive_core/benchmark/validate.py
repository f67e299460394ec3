"""Checks a W-CODA submission from its zip alone: every name, every count, every frame of every video.

A missing view silently drops a whole scene from the official score, and a broken file stops it, so that nothing is
taken on trust: a zip is refused before it is read where it is built to harm, and every video is decoded.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.progress import track
from magicdrive_core.video.decoder import decode_video, probe

KEY_FRAMES = (0, 6, 12)  # what the evaluator's detector looks at
LARGEST_VIDEO = 64 * 2**20  # bytes; at 4 Mbit/s a video of 16 frames has 0.67 MB
_NAME = re.compile(r"(?P<team>[A-Za-z0-9_-]+)_standard/(?P<token>[^/_]+)_gen(?P<generation>\d+)/(?P<file>[^/]+)")


@dataclass(frozen=True)
class Expected:
    """What a right submission holds. Counts that are None are taken from the zip itself."""

    scenes: int | None = None
    generations: int | None = None
    frames: int = 16
    fps: int = 12
    height: int = PICTURE_HEIGHT
    width: int = PICTURE_WIDTH
    max_mbit_s: float | None = 4.0


def validate(zip_path: Path, expected: Expected = Expected()) -> list[str]:
    """Faults of a submission, one line each; an empty list is a valid submission.

    Args:
        zip_path: ``results.zip``.
        expected: counts and properties to check against.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive:
            faults = list(_dangers(archive))
            if faults:
                return faults
            videos = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            named = {name: match for name in videos if (match := _NAME.fullmatch(name))}
            faults += [
                f"{name}: not of the form team_standard/token_genN/token_VIEW.mp4"
                for name in videos
                if name not in named
            ]
            faults += _counts(list(named.values()), expected)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                checks = pool.map(lambda name: _video_faults(archive, videos[name], expected), named)
                for found in track(checks, "validate", len(named)):
                    faults += found
            return faults
    except FileNotFoundError:
        return [f"{zip_path}: missing"]
    except (zipfile.BadZipFile, OSError) as error:
        return [f"{zip_path}: not a readable zip: {error}"]


def _dangers(archive: zipfile.ZipFile) -> Iterator[str]:
    """Entries that must not even be read."""
    seen = set()
    for entry in archive.infolist():
        name, path = entry.filename, PurePosixPath(entry.filename)
        mode = entry.external_attr >> 16
        if path.is_absolute() or ".." in path.parts or "\\" in name or re.match(r"[A-Za-z]:", name):
            yield f"{name}: the path leads out of the folder that it is unpacked in"
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            yield f"{name}: a link or device, not a file"
        if name in seen:
            yield f"{name}: twice in the zip"
        seen.add(name)
        if entry.flag_bits & 1:
            yield f"{name}: encrypted"
        if entry.file_size > LARGEST_VIDEO:
            yield f"{name}: {entry.file_size} bytes unpacked, a video has at most {LARGEST_VIDEO}"
        elif entry.file_size > 4096 + 4 * entry.compress_size:
            yield f"{name}: unpacks to {entry.file_size} bytes from {entry.compress_size}: no video shrinks like that"


def _counts(names: Sequence[re.Match[str]], expected: Expected) -> Iterator[str]:
    """Scenes x generations x six views, without gaps."""
    if not names:
        yield "no video in the zip"
        return
    teams = sorted({name["team"] for name in names})
    if len(teams) > 1:
        yield f"folders of {len(teams)} teams: {', '.join(teams)}"
    views: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        views[name["token"]][int(name["generation"])].add(name["file"])
    if expected.scenes is not None and len(views) != expected.scenes:
        yield f"{len(views)} scenes, {expected.scenes} expected"
    most = max(max(generations) for generations in views.values()) + 1
    wanted = range(most if expected.generations is None else expected.generations)
    for token, generations in sorted(views.items()):
        for generation in sorted(set(wanted) - set(generations)):
            yield f"{token}_gen{generation}: missing"
        for generation in sorted(set(generations) - set(wanted)):
            yield f"{token}_gen{generation}: one generation too many"
        right = {f"{token}_{view}.mp4": view for view in VIEWS}
        for generation, files in sorted(generations.items()):
            for file in sorted(set(right) - files):
                yield f"{token}_gen{generation}: {right[file]} is missing"
            for file in sorted(files - set(right)):
                yield f"{token}_gen{generation}/{file}: not one of the six views"


def _video_faults(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, expected: Expected) -> list[str]:
    """Decodes one video and compares everything that the track asks for."""
    name = entry.filename
    try:
        data = archive.read(entry)
        info = probe(io.BytesIO(data))
        faults = []
        if info.codec != "h264":
            faults.append(f"{name}: codec {info.codec}, not h264")
        if (info.height, info.width) != (expected.height, expected.width):
            faults.append(f"{name}: {info.width}x{info.height}, not {expected.width}x{expected.height}")
        if faults:
            return faults  # what is not asked for is not decoded: it may be a bomb
        if info.fps != expected.fps:
            faults.append(f"{name}: {info.fps:g} frames per second, not {expected.fps}")
        decoded = decode_video(io.BytesIO(data), max_pixels=2 * expected.height * expected.width)
        frames = sum(1 for _ in islice(decoded, expected.frames + 1))
    except MagicDriveError as error:
        return [f"{name}: {error.message.removeprefix('the video ')}"]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        return [f"{name}: cannot be unpacked: {error}"]
    if frames != expected.frames:
        faults.append(f"{name}: {frames if frames < expected.frames else info.frames} frames, not {expected.frames}")
    faults += [f"{name}: key frame {key} cannot be extracted" for key in KEY_FRAMES if frames <= key < expected.frames]
    if expected.max_mbit_s is not None and info.mbit_s > expected.max_mbit_s:
        faults.append(f"{name}: {info.mbit_s:.3f} Mbit/s, the cap is {expected.max_mbit_s:g}")
    return faults
