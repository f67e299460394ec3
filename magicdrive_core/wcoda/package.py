"""The W-CODA 2024 Track 2 submission: ``{team}_standard/{token}_gen{g}/{token}_{VIEW}.mp4`` in one results.zip.

Where ``submission.long`` names clips, ``{team}_long`` is packed, too (``long_videos``).
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from magicdrive_core.config.schema import Config, fingerprint
from magicdrive_core.config.versions import VIDEO_VERSION
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import atomic_file, atomic_folder, read_json, sha256_file, write_json
from magicdrive_core.utils.progress import track
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord, ViewFile, read_items, video_name
from magicdrive_core.wcoda.long_videos import place_long, read_long
from magicdrive_core.wcoda.submission import VideoName

MANIFEST, ZIP = "manifest.json", "results.zip"
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the same in every package: equal videos give an equal zip


@dataclass(frozen=True)
class PackagedFile:
    """One video of the package."""

    name: str  # in the zip
    sha256: str
    bytes: int
    mbit_s: float | None
    psnr: float | None  # dB against the frames that it was encoded from
    recoded: bool  # encoded for the package: the head of a longer clip, or of PNG frames
    item: str  # fingerprint of the generated item


@dataclass(frozen=True)
class Package:
    """A written package: its folder, its zip, and the manifest's entry for each file."""

    folder: Path
    zip_path: Path
    sha256: str  # of the zip
    files: list[PackagedFile]


def pack(
    config: Config, generated: Path, out: Path, lineage: Mapping[str, str] | None = None, project: Path = Path()
) -> Package:
    """Pack all finished items of a folder; an existing package of the same items is reused.

    Args:
        config: All settings; team, frames of a video, frame rate and cap on the bit rate are used.
        generated: Folder of items.
        out: Folder for ``{team}_standard/``, ``results.zip`` and ``manifest.json``.
        lineage: Origin of the package (commit, data, runs), written into the manifest unchanged; None: unknown.
        project: The project's folder; folders of the long set are relative to it.

    Returns:
        The package; its files are those of the standard set, then those of the long set.

    Raises:
        MagicDriveError: There are no items, the set is incomplete, a clip is too short, or a file has changed.
    """
    records = [record for record in read_items(generated) if record.generation < config.generate.generations]
    _check_complete(config, records, generated)
    long = read_long(config, records, project)
    every = [*records, *(record for weather in long.values() for record in weather.values())]
    sources = [asdict(record)["views"] for record in every]
    key = fingerprint(config.submission, config.video, sources, VIEWS, VIDEO_VERSION)
    folder, zip_path = out / f"{config.submission.team}_standard", out / ZIP
    done = _packed_before(out, folder, zip_path, key)
    if done is not None:
        return done
    with atomic_folder(folder) as partial:
        files = [
            _place(config, record, view, generated / record.name, partial)
            for record in track(records, "package", len(records))
            for view in VIEWS
        ]
    files += _pack_long(config, long, out, {file.name: file for file in files}, project)
    _write_zip(out, zip_path, [file.name for file in files])
    package = Package(folder, zip_path, sha256_file(zip_path), files)
    write_json(
        out / MANIFEST,
        {
            "fingerprint": key,
            "zip_sha256": package.sha256,
            "zip_bytes": zip_path.stat().st_size,
            "fps": config.video.fps,
            "frames": config.submission.frames,
            "max_mbit_s": config.video.max_mbit_s,
            "files": [asdict(file) for file in files],
            "lineage": {
                **(lineage or {}),
                "items": {record.name: record.lineage for record in records},
                "long_items": {w: {r.name: r.lineage for r in chosen.values()} for w, chosen in long.items()},
            },
        },
    )
    return package


def read_package(out: Path) -> Package:
    """Read the package of a folder from its manifest.

    Args:
        out: The folder that holds ``manifest.json``.

    Returns:
        The package as recorded; its files are not checked.

    Raises:
        MagicDriveError: The folder holds no package.
    """
    manifest = read_json(out / MANIFEST, "run magicdrive package")
    files = [PackagedFile(**entry) for entry in manifest["files"]]
    top = PurePosixPath(files[0].name).parts[0]  # the standard set comes first
    return Package(out / top, out / ZIP, manifest["zip_sha256"], files)


def _check_complete(config: Config, records: Sequence[ItemRecord], generated: Path) -> None:
    if not records:
        raise MagicDriveError(f"{generated} holds no generated clips", "run magicdrive generate")
    wanted = config.submission.frames
    scenes = {record.sample for record in records}
    names = {record.name for record in records}
    missing = [
        f"{scene}_gen{generation}"
        for scene in sorted(scenes)
        for generation in range(config.generate.generations)
        if f"{scene}_gen{generation}" not in names
    ]
    if missing:
        raise MagicDriveError(
            f"{len(missing)} of {len(scenes) * config.generate.generations} clips are not generated, "
            f"the first is {missing[0]}",
            "run magicdrive generate again; finished clips are reused",
        )
    for record in records:
        if record.frames < max(2, wanted):
            raise MagicDriveError(
                f"{record.name} has {record.frames} frame(s), a W-CODA video {wanted}",
                f"set generate.frames to {(wanted + 6) // 8 * 8 + 1} or more, and use scenes that long",
            )
        absent = [view for view in VIEWS if view not in record.views]
        faults = [f"{view} is missing" for view in absent] + record.faults(generated / record.name)
        if faults:
            raise MagicDriveError(
                f"{record.name}: {faults[0]}", f"delete {generated / record.name} and run magicdrive generate"
            )


def _place(config: Config, record: ItemRecord, view: str, source: Path, folder: Path) -> PackagedFile:
    """Copy a video of the right length; encode frames, or the first frames of a longer video."""
    entry = record.views[view]
    name = PurePosixPath(record.name, video_name(record.sample, view))
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    recoded = record.frames != config.submission.frames or (source / entry.file).is_dir()
    if recoded:
        head = islice(read_view(source / entry.file), config.submission.frames)
        made = encode_video(head, target, fps=config.video.fps, max_mbit_s=config.video.max_mbit_s)
        entry = ViewFile(target.name, sha256_file(target), made.bytes, made.mbit_s, made.psnr)
    else:
        shutil.copyfile(source / entry.file, target)
    top = f"{config.submission.team}_standard"
    return PackagedFile(
        f"{top}/{name}", entry.sha256, entry.bytes, entry.mbit_s, entry.psnr, recoded, record.fingerprint
    )


def _pack_long(
    config: Config,
    long: Mapping[str, Mapping[str, ItemRecord]],
    out: Path,
    standard: Mapping[str, PackagedFile],
    project: Path,
) -> list[PackagedFile]:
    """Write ``{team}_long/``; sunny videos start with the packaged videos of the standard set, given by name."""
    folders = config.submission.long
    if folders is None:
        return []
    top, files = f"{config.submission.team}_long", []
    with atomic_folder(out / top) as partial:
        work = [(weather, record, view) for weather in long for record in long[weather].values() for view in VIEWS]
        for weather, record, view in track(work, "long set", len(work)):
            name = VideoName.of(config.submission.team, record.sample, weather, video_name(record.sample, view))
            target = partial / PurePosixPath(name.path).relative_to(top)
            target.parent.mkdir(exist_ok=True)
            first = standard[name.round_one()]
            head = (out / first.name, first.psnr) if weather == "sunny" else None
            source = project / folders.of(weather) / record.name
            entry, recoded = place_long(config, record, view, source, target, head)
            files.append(
                PackagedFile(
                    name.path, entry.sha256, entry.bytes, entry.mbit_s, entry.psnr, recoded, record.fingerprint
                )
            )
    return files


def _write_zip(folder: Path, path: Path, names: Sequence[str]) -> None:
    """Writes the files one after the other, uncompressed (they are videos), with fixed dates and rights."""
    with atomic_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, ZIP_DATE)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # the rights above are Unix', whatever host writes them
            entry.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 2**20)


def _packed_before(out: Path, folder: Path, zip_path: Path, key: str) -> Package | None:
    if not (out / MANIFEST).is_file() or not zip_path.is_file() or not folder.is_dir():
        return None
    manifest = read_json(out / MANIFEST)
    if manifest.get("fingerprint") != key or manifest.get("zip_sha256") != sha256_file(zip_path):
        return None
    return read_package(out)
