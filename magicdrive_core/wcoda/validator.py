"""Checks a W-CODA submission from its zip alone: every name, every count, every frame of every video.

A missing view silently drops a whole scene from the official score, and a broken file stops scoring. So nothing is
assumed: a zip that could do harm is rejected before it is read, and every video is decoded. The verdict is kept beside
the package, so that each package is decoded once.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from magicdrive_core.config.versions import VALIDATOR_VERSION
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.protocol import KEY_FRAMES
from magicdrive_core.utils.files import UNREADABLE_ZIP, read_json, sha256_file, write_json
from magicdrive_core.utils.progress import track
from magicdrive_core.video.decoder import VideoInfo, digest_frames, probe, scan_video
from magicdrive_core.wcoda.submission import OFFICIAL, Expected, VideoName, count_faults

LARGEST_VIDEO = 64 * 2**20  # bytes; at 4 Mbit/s a video of 16 frames has 0.67 MB, one of 20 s 10 MB
LONGEST_VIDEO = 1200  # frames of a long video; nuScenes' scenes have 241 at most
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # what a damaged entry raises


def validate(zip_path: Path, expected: Expected = OFFICIAL) -> list[str]:
    """Find the faults of a submission.

    Args:
        zip_path: The ``results.zip``.
        expected: Counts and properties to check against.

    Returns:
        One line for each fault; an empty list for a valid submission.
    """
    return [_one_line(fault) for fault in _faults(zip_path, expected)]


def _one_line(fault: str) -> str:
    """Escape line breaks and terminal commands, which names in a zip may contain."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in fault)


def _faults(zip_path: Path, expected: Expected) -> list[str]:
    try:
        with zipfile.ZipFile(zip_path) as archive:
            faults = list(_dangers(archive, zip_path.stat().st_size))
            if faults:
                return faults
            paths = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            videos = {path: name for path in paths if (name := VideoName.parse(path))}
            faults += [
                f"{path}: not of the form team_standard/token_genN/token_VIEW.mp4"
                for path in paths
                if path not in videos
            ]
            faults += count_faults(list(videos.values()), expected)
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves the interpreter to the others
                checks = pool.map(lambda name: _Check(archive, name, expected).run(), videos.values())
                done = list(track(checks, "validate", len(videos)))
            faults += [fault for check in done for fault in check.faults]
            return faults + list(_unequal_views(done))
    except FileNotFoundError:
        return [f"{zip_path}: missing"]
    except UNREADABLE_ZIP as error:
        return [f"{zip_path}: not a readable zip: {error}"]


def _dangers(archive: zipfile.ZipFile, size: int) -> Iterator[str]:
    """Yield entries of a zip of ``size`` bytes that are not safe to read."""
    packed, seen = sum(entry.compress_size for entry in archive.infolist()), set()
    if packed > size:
        yield f"its entries have {packed} bytes in a zip of {size}: they overlap"
    for entry in archive.infolist():
        name, path = entry.filename, PurePosixPath(entry.filename)
        mode = entry.external_attr >> 16
        if path.is_absolute() or ".." in path.parts or "\\" in name or re.match(r"[A-Za-z]:", name):
            yield f"{name}: the path leads outside the folder"
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


@dataclass
class _Check:
    """Decodes one video and checks everything that the track requires."""

    archive: zipfile.ZipFile
    name: VideoName
    expected: Expected
    frames: int | None = None  # decoded; None where nothing was
    faults: list[str] = field(default_factory=list)

    def run(self) -> _Check:
        """Run all checks; they append to ``faults``.

        Returns:
            This check, so that a thread pool can map it.
        """
        try:
            data = self.archive.read(self.name.path)
            info = probe(io.BytesIO(data))
            if self._wrong_kind(info):
                return self  # what is not asked for is not decoded: it may be a bomb
            self._decode(data, info)
            if self.name.variant == "sunny":
                self._compare_heads(data)
        except MagicDriveError as error:
            self._fault(error.message.removeprefix("the video "))
        except _BROKEN as error:
            self._fault(f"cannot be unpacked: {error}")
        return self

    def _fault(self, text: str) -> None:
        self.faults.append(f"{self.name.path}: {text}")

    @property
    def _most_pixels(self) -> int:
        return 2 * self.expected.height * self.expected.width

    def _wrong_kind(self, info: VideoInfo) -> bool:
        expected = self.expected
        if info.codec != "h264":
            self._fault(f"codec {info.codec}, not h264")
        elif (info.height, info.width) != (expected.height, expected.width):
            self._fault(f"{info.width}x{info.height}, not {expected.width}x{expected.height}")
        return bool(self.faults)

    def _decode(self, data: bytes, info: VideoInfo) -> None:
        expected, long = self.expected, self.name.long
        if info.fps != expected.fps:
            self._fault(f"{info.fps:g} frames per second, not {expected.fps}")
        elif not info.even:
            self._fault("frames at uneven times")
        most = LONGEST_VIDEO if long else expected.frames
        keep = [key for key in KEY_FRAMES if key < expected.frames]
        self.frames, pictures = scan_video(io.BytesIO(data), keep, most=most + 1, max_pixels=self._most_pixels)
        if self.frames > most or (not long and self.frames != most):
            count = max(self.frames, info.frames)
            self._fault(f"{count} frames, " + (f"more than {most}" if long else f"not {most}"))
        elif self.frames < expected.frames:
            self._fault(f"{self.frames} frames, fewer than the {expected.frames} of round 1")
        for key in keep:
            if key not in pictures:
                self._fault(f"key frame {key} cannot be extracted")
        if expected.max_mbit_s is not None and info.mbit_s > expected.max_mbit_s:
            self._fault(f"{info.mbit_s:.3f} Mbit/s, the cap is {expected.max_mbit_s:g}")

    def _compare_heads(self, data: bytes) -> None:
        """Check that the sunny video starts with the frames of round 1; a missing video is a fault of the counts."""
        try:
            first = self.archive.read(self.name.round_one())
        except KeyError:
            return
        heads = {
            digest_frames(io.BytesIO(video), self.expected.frames, max_pixels=self._most_pixels)
            for video in (first, data)
        }
        if len(heads) > 1:
            self._fault(f"does not start with the {self.expected.frames} frames of {self.name.round_one()}")


def _unequal_views(checks: Sequence[_Check]) -> Iterator[str]:
    """Yield long videos of one scene and weather whose views differ in length."""
    lengths: dict[str, Counter[int]] = defaultdict(Counter)
    for check in checks:
        if check.name.long and check.frames is not None:
            lengths[f"{check.name.token}_{check.name.variant}"][check.frames] += 1
    for folder, counts in sorted(lengths.items()):
        if len(counts) > 1:
            yield f"{folder}: its views have {' and '.join(map(str, sorted(counts)))} frames"


VERDICT = "validation.json"  # beside the package: its digest, what was expected, and the faults


def judge(zip_path: Path, expected: Expected) -> list[str]:
    """Return the faults of a zip; reuse ``validation.json`` beside it if that belongs to the same zip and checks.

    Args:
        zip_path: The ``results.zip``.
        expected: Counts and properties to check against.

    Returns:
        One line for each fault, as ``validate`` returns them.

    Raises:
        MagicDriveError: The folder cannot be written.
    """
    if not zip_path.is_file():
        return validate(zip_path, expected)
    path = zip_path.with_name(VERDICT)
    question = {"zip_sha256": sha256_file(zip_path), "expected": asdict(expected), "version": VALIDATOR_VERSION}
    if path.is_file():
        verdict = read_json(path)
        if {key: verdict.get(key) for key in question} == question:
            return list(verdict["faults"])
    faults = validate(zip_path, expected)
    write_json(path, {**question, "faults": faults})
    return faults
