"""The infos stage: recordings become 12 Hz scenes, written as ``frames.parquet``, one file a scene, and ``infos.json``.

In the parquet file a frame is a row and a scene is a row group (``scene_store.SCHEMA`` documents the columns); it is
meant for other programs. The files of single scenes hold the same rows; this project's processes map them into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import pyarrow.parquet as pq
from rich.console import Console

from magicdrive_core.config.schema import Config, fingerprint
from magicdrive_core.data.adapters import Adapter, open_adapter
from magicdrive_core.data.limits import check_scene
from magicdrive_core.data.nuscenes_scenes import choose_splits
from magicdrive_core.data.pictures import PictureInventory, check_pictures
from magicdrive_core.data.published_infos import read_published, write_published
from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.data.scene_store import SCHEMA, Scenes, read_scene, scene_path, to_table, write_scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.utils.files import atomic_folder, read_json, resumable_folder, sha256_file, write_json
from magicdrive_core.utils.process_pool import for_each_scene

FRAMES = "frames.parquet"
SUMMARY = "infos.json"
ALIGNMENTS = {False: "by time stamp", True: "published"}  # by config.published, see ``timeline``


def build_infos(config: Config, out: Path | str) -> None:
    """Write the infos of every scene of ``config.data`` to a folder, completely or not at all.

    An interrupted run resumes after the scenes that are written. With ``data.skip_bad``, scenes with broken records,
    maps or pictures are left out, reported on stderr and listed in ``infos.json``.

    Args:
        config: the whole configuration.
        out: the infos folder.

    Raises:
        MagicDriveError: tables, maps or pictures are unusable; the message names them.
        UsageError: ``data.val_scenes`` is impossible.
    """
    adapter = open_adapter(config)
    names = adapter.names()
    splits = choose_splits(names, config.data.val_scenes, config.data.version)
    unpaired = "leave_out" if config.published else config.data.unpaired
    facts = {"version": config.data.version, "rule": ALIGNMENTS[config.published], "unpaired": unpaired}
    key = fingerprint(adapter.digest(), adapter.map_digest(), facts, splits, config.data.root, str(SCHEMA))
    with resumable_folder(out, key) as folder:
        make = partial(_make_scene, adapter=adapter, splits=splits, folder=folder, skip_bad=config.data.skip_bad)
        # The tables of all of nuScenes take gigabytes and most of a minute to read: forked processes share them.
        found = dict(zip(names, for_each_scene(make, names, "12 Hz infos", start="fork"), strict=True))
        quarantined = {name: fault.record for name, fault in found.items() if fault.record}
        for name, reason in quarantined.items():
            Console(stderr=True).print(f"{name} is left out: {reason}", highlight=False, soft_wrap=True)
        faults = [line for fault in found.values() for line in fault.pictures]
        if faults:
            hint = f"complete the download, or render them: {_RENDER.format(config.data.root, config.data.version)}"
            raise MagicDriveError(_first_of(faults), hint)
        with InfosWriter(folder, facts, adapter.root, quarantined) as writer:
            for name in names:
                if name not in quarantined:
                    writer.add(read_scene(scene_path(folder, name)), least=7 if config.published else 1)
        if not writer.scenes:
            reason = "is usable" if quarantined else "has more than six frames"
            raise MagicDriveError(f"{config.data.root}: no scene of {config.data.version} {reason}")


@dataclass(frozen=True)
class _Fault:
    """The fault of a scene: why it is left out, or one line for each unusable picture."""

    record: str = ""
    pictures: tuple[str, ...] = ()


def _make_scene(name: str, adapter: Adapter, splits: Mapping[str, str], folder: Path, *, skip_bad: bool) -> _Fault:
    """Write a scene unless an interrupted run did; a scene with faults is not written."""
    if scene_path(folder, name).is_file():
        return _Fault()
    try:
        scene = adapter.read(name, splits[name])
        check_scene(scene)
        adapter.vector_map(scene)  # a broken map would end the next stage for all scenes
        broken = check_pictures(adapter.root, adapter.pictures(scene))
    except MagicDriveError as error:
        if not skip_bad:
            raise
        return _Fault(record=error.message)
    if broken and skip_bad:
        return _Fault(record=_first_of(broken))
    if broken:
        return _Fault(pictures=tuple(broken))
    write_scene(folder, scene)
    return _Fault()


def import_infos(files: Mapping[str, Path], root: Path, version: str, out: Path | str) -> int:
    """Write published info files as an infos folder, completely or not at all; pictures are not checked.

    Scenes get their tokens and names from ``scene.json`` if the tables are there.

    Args:
        files: the info file of each split, "train" and "val".
        root: the data root.
        version: name of the table folder.
        out: the infos folder.

    Returns:
        The number of scenes.

    Raises:
        MagicDriveError: a file is not plain data or holds a broken record; the message names it.
    """
    names = _scene_names(root / version)
    scenes = [scene for split, path in files.items() for scene in read_published(path, split, names)]
    sources = " and ".join(path.name for path in files.values())
    facts = {"version": version, "rule": f"imported from {sources}", "unpaired": "leave_out"}
    with atomic_folder(out) as folder:
        write_infos(scenes, facts, folder)
    return len(scenes)


def export_infos(infos: Path, split: str, out: Path) -> list[Scene]:
    """Write the scenes of a split as one published info file.

    Args:
        infos: the infos folder.
        split: "train" or "val"; a scene of the split "both" belongs to either.
        out: the file to write.

    Returns:
        The scenes that were written.

    Raises:
        MagicDriveError: the infos are missing or have no scene of the split, or the disk is full or not writable.
    """
    scenes = [scene for scene in read_scenes(infos) if scene.split in (split, "both")]
    if not scenes:
        raise MagicDriveError(f"{infos} has no scene of the split {split}", f"{infos / SUMMARY} lists the splits")
    write_published(scenes, out, read_json(infos / SUMMARY)["version"])
    return scenes


def write_infos(scenes: Iterable[Scene], facts: Mapping[str, str], folder: Path) -> None:
    """Write all files of an infos folder; pictures are not checked.

    Args:
        scenes: the scenes, in any order.
        facts: how the scenes were made, see ``InfosWriter``.
        folder: the infos folder, which must exist.

    Raises:
        MagicDriveError: a scene is impossible, two have one name or token, or the disk is full or not writable.
    """
    scenes = list(scenes)
    for field in ("name", "token"):
        counts = Counter(getattr(scene, field) for scene in scenes)
        if scenes and counts.most_common(1)[0][1] > 1:
            raise MagicDriveError(
                f"{counts.most_common(1)[0][1]} scenes have the {field} {counts.most_common(1)[0][0]!r}"
            )
    with InfosWriter(folder, facts) as writer:
        for scene in sorted(scenes, key=lambda scene: scene.name):
            check_scene(scene)
            write_scene(folder, scene)
            writer.add(scene)


def read_scenes(folder: Path | str) -> Scenes:
    """Open the scenes of an infos folder, in the order of their names; files are mapped, not loaded.

    Args:
        folder: the infos folder.

    Returns:
        A lazy sequence: each access reads the scene again.

    Raises:
        MagicDriveError: the folder holds no infos.
    """
    return Scenes(folder)


def find_scene(infos: Path, name: str) -> Scene:
    """Find a scene of an infos folder by its name.

    Args:
        infos: the infos folder.
        name: name of the scene, such as "scene-0061".

    Returns:
        The scene.

    Raises:
        UsageError: there is no such scene.
        MagicDriveError: the folder holds no infos.
    """
    scenes = {scene.name: scene for scene in read_scenes(infos)}
    if name not in scenes:
        raise UsageError(f"there is no scene {name!r}", f"known: {', '.join(list(scenes)[:10])}")
    return scenes[name]


def infos_digest(folder: Path | str) -> str:
    """Digest an infos folder; ``frames.parquet`` stands for the files of single scenes, which hold the same rows.

    Args:
        folder: the infos folder.

    Returns:
        64 hex digits.

    Raises:
        FileNotFoundError: the folder holds no infos.
    """
    return fingerprint({name: sha256_file(Path(folder) / name) for name in (FRAMES, SUMMARY)})


def pictures_changed(infos: Path, root: Path) -> bool:
    """Check whether pictures changed since the infos were made, by names and lengths only.

    DVC tracks only the tables, because it would read every picture (docs/decisions/0002-data-versioning.md).

    Args:
        infos: the infos folder.
        root: the data root.

    Returns:
        True if the length of any picture that the infos name has changed (a missing file counts as length 0); False
        also if the infos are missing or imported.
    """
    if not (infos / SUMMARY).is_file():
        return False
    digest = read_json(infos / SUMMARY).get("picture_digest")
    if digest is None:  # imported infos: pictures were not checked
        return False
    frames = pq.read_table(infos / FRAMES, columns=["pictures"])["pictures"].combine_chunks()
    return bool(digest != PictureInventory.of(root, frames.flatten().to_pylist()).digest)


class InfosWriter:
    """Write ``frames.parquet`` scene by scene, and ``infos.json`` at the end.

    Args:
        folder: the infos folder.
        facts: "version", "rule" (the alignment) and "unpaired": how the scenes were made, stored in both files.
        root: the data root, whose picture lengths are recorded; None if pictures are not checked.
        quarantined: why each missing scene was left out, by name.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, str],
        root: Path | None = None,
        quarantined: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._facts, self._root = folder, facts, root
        self._quarantined = dict(quarantined or {})
        schema = SCHEMA.with_metadata({f"magicdrive.{name}": value for name, value in facts.items()})
        self._file = pq.ParquetWriter(folder / FRAMES, schema, compression="zstd")
        self.scenes: dict[str, list[str]] = {}
        self.left_out: list[str] = []
        self._pictures: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()

    def add(self, scene: Scene, least: int = 1) -> None:
        """Add a scene as a row group, or remove its file if the scene is too short.

        Args:
            scene: a scene whose own file is in the folder already.
            least: number of frames that a scene must have.
        """
        if len(scene) < least:
            self.left_out.append(scene.name)
            scene_path(self._folder, scene.name).unlink()
            return
        self._file.write_table(to_table(scene), row_group_size=len(scene))
        self.scenes.setdefault(scene.split, []).append(scene.name)
        self._pictures.update(path for frame in scene.pictures for path in frame)
        self._counts.update(scenes=1, frames=len(scene), key_frames=int(scene.key_frames.sum()))
        self._classes.update(name for frame in scene.boxes for name in frame.names)

    def __enter__(self) -> InfosWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if error is None:
            inventory = None if self._root is None else PictureInventory.of(self._root, self._pictures)
            write_json(
                self._folder / SUMMARY,
                {
                    **self._facts,
                    **self._counts,
                    "pictures": len(self._pictures),
                    "picture_bytes": inventory.bytes if inventory else None,
                    "picture_digest": inventory.digest if inventory else None,
                    "boxes": {name: self._classes[name] for name in CLASSES},
                    "splits": self.scenes,
                    "left_out": self.left_out,
                    "quarantined": self._quarantined,
                },
            )


_RENDER = "`magicdrive synth --render-for {} --version {}`"


def _scene_names(tables: Path) -> dict[str, tuple[str, str]]:
    """Read (token, name) of the scene of each sample, by the sample's token; empty without tables."""
    if not (tables / "sample.json").is_file():
        return {}
    names = {scene["token"]: scene["name"] for scene in read_json(tables / "scene.json")}
    samples = read_json(tables / "sample.json")
    return {sample["token"]: (sample["scene_token"], names[sample["scene_token"]]) for sample in samples}


def _first_of(faults: Sequence[str]) -> str:
    """Return the first fault, and how many there are."""
    return faults[0] + (f" ({len(faults)} pictures are unusable)" if len(faults) > 1 else "")
