"""nuScenes data roots as plain files, without the devkit: find the tables, read them, cut them down to some key frames.

An evaluation that looks at three key frames of a scene writes a cut: tables that are complete in themselves, so that
any program can read them, and that do not ask for the key frames that were not generated.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from magicdrive_core.errors import MagicDriveError, system_error
from magicdrive_core.utils.files import check_regular

Record = dict[str, Any]
Tables = dict[str, list[Record]]

REPAIR = "unpack the nuScenes metadata archive again, or make generated data with `magicdrive synth`"
MAPS = "unpack the nuScenes map expansion v1.3 into maps/ (nuScenes-map-expansion-v1.3.zip)"
SPLIT = "generated"  # key in splits.json, the devkit's way to evaluate scenes outside its official splits
TABLES = (
    *("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample"),
    *("sample_annotation", "sample_data", "scene", "sensor", "visibility"),
)


def find_tables(root: Path | str, version: str) -> Path:
    """Return the folder of the tables, ``root/version``.

    Args:
        root: the data root.
        version: name of the table folder, such as "v1.0-mini".

    Returns:
        The folder, which exists.

    Raises:
        MagicDriveError: the folder is missing; the hint names the versions that are there.
    """
    root = Path(root)
    folder = root / version
    if not folder.is_dir():
        raise MagicDriveError(f"{folder} is missing: no nuScenes tables there", _versions_of(root))
    return folder


def check_root(root: Path | str, version: str) -> None:
    """Check that a data root has the folders of tables and maps.

    Args:
        root: the data root.
        version: name of the table folder, such as "v1.0-mini".

    Raises:
        MagicDriveError: one of them is missing.
    """
    find_tables(root, version)
    maps = Path(root) / "maps"
    if not maps.is_dir():
        raise MagicDriveError(f"{maps} is missing: no nuScenes maps there", MAPS)


def stream_records(path: Path) -> Iterator[tuple[Record, str]]:
    """Read a table record by record: those of all of nuScenes do not fit into memory as Python objects.

    Args:
        path: the JSON file, a list of records.

    Yields:
        Each record, whose token is a text, and its own JSON text.

    Raises:
        MagicDriveError: the file is missing, not valid JSON (with line and column) or not a list of records with
            tokens.
    """
    try:
        check_regular(path)
        with path.open(encoding="utf-8") as file:
            for row, (record, text) in enumerate(_Window(path, file).records()):
                if not isinstance(record.get("token"), str) or not record["token"]:
                    raise MagicDriveError(f"{path}: the record in row {row} has no token", REPAIR)
                yield record, text
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", REPAIR) from None
    except UnicodeDecodeError as error:
        raise MagicDriveError(f"{path} is not valid JSON: {error}", REPAIR) from None
    except OSError as error:
        raise system_error(error.errno or 0, path) or MagicDriveError(f"{path} cannot be read: {error}") from None


_BLOCK = 1 << 22  # characters that are read at once
_LONGEST = 1 << 26  # characters that a record may have
_SPACE = re.compile(r"[ \t\n\r]*")


class _Window:
    """A window that moves over the text of a JSON list.

    Args:
        path: the file, for messages.
        file: the same file, opened.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._at = "", 0  # the window, and the first character that is not decoded yet
        self._passed, self._line, self._column = 0, 1, 1  # position of the window in the file

    def records(self) -> Iterator[tuple[Record, str]]:
        """Decode the list.

        Yields:
            Each record, and its text.

        Raises:
            MagicDriveError: the text is not a list of records.
        """
        if self._next() not in ("[", ""):
            raise MagicDriveError(f"{self._path} is not a list of records", REPAIR)
        self._take("[", "Expecting value")
        if self._next() != "]":
            yield self._record()
            while self._next() == ",":
                self._at += 1
                yield self._record()
        self._take("]", "Expecting ',' delimiter")
        if self._next():
            raise self._fault("Extra data", self._at)

    def _record(self) -> tuple[Record, str]:
        if self._next() in ("", "]", "}", ",", ":"):
            raise self._fault("Expecting value", self._at)
        if self._next() != "{":
            raise MagicDriveError(f"{self._path} is not a list of records", REPAIR)
        while True:
            start = self._at
            try:
                record, self._at = _decode(self._text, start)
                return record, self._text[start : self._at]
            except json.JSONDecodeError as error:  # also where the window ends within the record
                if len(self._text) - start > _LONGEST or not self._move():
                    raise self._fault(error.msg, error.pos - start + self._at) from None
            except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
                raise self._fault(str(error), start) from None

    def _next(self) -> str:
        """Return the next character that is not a space; "" at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches always
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._move():
                return ""

    def _take(self, character: str, fault: str) -> None:
        if self._next() != character:
            raise self._fault(fault, self._at)
        self._at += 1

    def _move(self) -> bool:
        """Drop what is decoded and read another block; return whether there was one."""
        self._line, self._column = self._position(self._at)
        self._passed += self._at
        block = self._file.read(_BLOCK)
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def _position(self, index: int) -> tuple[int, int]:
        """Return line and column of a character of the window, both from 1."""
        lines = self._text.count("\n", 0, index)
        return self._line + lines, index - self._text.rfind("\n", 0, index) if lines else self._column + index

    def _fault(self, message: str, index: int) -> MagicDriveError:
        line, column = self._position(index)
        where = f"line {line} column {column} (char {self._passed + index})"
        return MagicDriveError(f"{self._path} is not valid JSON: {message}: {where}", REPAIR)


_decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode


def read_tables(
    root: Path,
    version: str,
    names: Sequence[str] = TABLES,
    keep: Mapping[str, Callable[[Record], bool]] | None = None,
) -> Tables:
    """Read tables of ``root/version``, in the given order.

    Args:
        root: the data root.
        version: name of the table folder.
        names: the tables to read, by default all 13.
        keep: says which records of a table to keep, by name of the table; by default all.

    Returns:
        The records of each table, by its name.

    Raises:
        MagicDriveError: a table is missing or not valid JSON.
    """
    folder, tables = find_tables(root, version), {}
    for name in names:
        wanted = (keep or {}).get(name, lambda _: True)
        tables[name] = [record for record, _ in stream_records(folder / f"{name}.json") if wanted(record)]
    return tables


def read_key_frames(root: Path, version: str, samples: Sequence[str]) -> Tables:
    """Read all tables, but only those records of the largest ones that belong to some key frames.

    Args:
        root: the data root.
        version: name of the table folder.
        samples: tokens of the key frames.

    Returns:
        Tables that ``cut_tables`` can cut to these key frames.

    Raises:
        MagicDriveError: a table is missing or not valid JSON.
    """
    wanted, poses = set(samples), set()

    def of_key_frame(record: Record) -> bool:
        return record.get("sample_token") in wanted

    def sensor_record(record: Record) -> bool:
        found = bool(record.get("is_key_frame")) and of_key_frame(record)
        if found:
            poses.add(record.get("ego_pose_token"))
        return found

    keep = {
        "sample_data": sensor_record,
        "ego_pose": lambda record: record["token"] in poses,
        "sample_annotation": of_key_frame,
    }
    order = ("sample_data", *(name for name in TABLES if name != "sample_data"))  # it says which poses are wanted
    return read_tables(root, version, order, keep)


def cut_tables(tables: Tables, samples: Sequence[str]) -> Tables:
    """Cut tables down to some key frames; every token that a record names is still there.

    Neighbours that are cut are forgotten: the first kept sample of a scene has no ``prev``, and an object that only
    one kept sample shows has no velocity.

    Args:
        tables: the tables of a whole data set; they are not changed.
        samples: tokens of the key frames to keep.

    Returns:
        The same tables with fewer records.

    Raises:
        MagicDriveError: a sample is not in the tables.
    """
    wanted = set(samples)
    kept = [record for record in tables["sample"] if record["token"] in wanted]
    missing = wanted - {record["token"] for record in kept}
    if missing:
        raise MagicDriveError(f"sample.json has no record {min(missing)!r}", "the videos belong to other tables")
    by_scene: dict[str, list[Record]] = defaultdict(list)
    for record in kept:
        by_scene[record["scene_token"]].append(record)
    for records in by_scene.values():
        records.sort(key=lambda record: record["timestamp"])
    sensors = {record["token"]: record["sensor_token"] for record in tables["calibrated_sensor"]}
    data = [r for r in tables["sample_data"] if r["is_key_frame"] and r["sample_token"] in wanted]
    data.sort(key=lambda record: record["timestamp"])
    scene_of = {record["token"]: record["scene_token"] for record in kept}
    tracks: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in data:
        tracks[scene_of[record["sample_token"]], sensors[record["calibrated_sensor_token"]]].append(record)
    annotations = [record for record in tables["sample_annotation"] if record["sample_token"] in wanted]
    time_of = {record["token"]: record["timestamp"] for record in kept}
    annotations.sort(key=lambda record: time_of[record["sample_token"]])
    objects: dict[str, list[Record]] = defaultdict(list)
    for record in annotations:
        objects[record["instance_token"]].append(record)
    poses = {record["ego_pose_token"] for record in data}
    return tables | {
        "scene": [
            _scene_with(record, by_scene[record["token"]]) for record in tables["scene"] if record["token"] in by_scene
        ],
        "sample": [record for records in by_scene.values() for record in _linked(records)],
        "sample_data": [record for records in tracks.values() for record in _linked(records)],
        "sample_annotation": [record for records in objects.values() for record in _linked(records)],
        "instance": [_instance_with(r, objects[r["token"]]) for r in tables["instance"] if r["token"] in objects],
        "ego_pose": [record for record in tables["ego_pose"] if record["token"] in poses],
    }


def write_cut(tables: Tables, root: Path, version: str, out: Path) -> None:
    """Write cut tables as a data root with map pictures, map expansion and ``splits.json`` (one split, ``SPLIT``).

    Args:
        tables: the result of ``cut_tables``.
        root: the data root that they were cut from; its maps are hard-linked where the file system allows it.
        version: name of the table folder.
        out: the new data root.
    """
    folder = out / version
    folder.mkdir(parents=True)
    for name, records in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    splits = {SPLIT: [record["name"] for record in tables["scene"]]}
    (folder / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    expansion = root / "maps/expansion"
    files = [*(root / record["filename"] for record in tables["map"]), *sorted(expansion.glob("*.json"))]
    for path in files:
        link_or_copy(path, out / path.relative_to(root))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file if both paths are on one file system, copy it otherwise.

    Args:
        source: the file.
        target: where it must appear; missing parent folders are made, and an existing file is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)


def _linked(records: Sequence[Record]) -> list[Record]:
    """Link records in order of time: each with the tokens of its neighbours as ``prev`` and ``next``."""
    tokens = ["", *(record["token"] for record in records), ""]
    return [record | {"prev": tokens[n], "next": tokens[n + 2]} for n, record in enumerate(records)]


def _scene_with(scene: Record, samples: Sequence[Record]) -> Record:
    ends = {"first_sample_token": samples[0]["token"], "last_sample_token": samples[-1]["token"]}
    return scene | ends | {"nbr_samples": len(samples)}


def _instance_with(instance: Record, annotations: Sequence[Record]) -> Record:
    ends = {"first_annotation_token": annotations[0]["token"], "last_annotation_token": annotations[-1]["token"]}
    return instance | ends | {"nbr_annotations": len(annotations)}


def _versions_of(root: Path) -> str:
    if not root.is_dir():
        return f"{root} does not exist: set data.root in params.yaml, or run `magicdrive synth`"
    versions = sorted(table.parent.name for table in root.glob("*/sample_data.json"))
    if versions:
        return f"set data.version in params.yaml to one of: {', '.join(versions)}"
    return "set data.root in params.yaml to a nuScenes root, or run `magicdrive synth`"
