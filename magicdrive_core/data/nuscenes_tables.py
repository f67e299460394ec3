"""nuScenes tables through nuscenes-devkit, for any root and version.

The only importer of the devkit but for its own evaluation (``scores/detection.py``). It takes seconds to import:
modules that merely read artefacts import this one inside the functions that need it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes

from magicdrive_core.data.nuscenes_files import find_tables
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json

Record = dict[str, Any]

LIDAR = "LIDAR_TOP"
# Names of the official splits, by version: (training, validation).
_OFFICIAL = {"v1.0-trainval": ("train", "val"), "v1.0-mini": ("mini_train", "mini_val")}


class Tables(NuScenes):
    """The devkit's tables, quiet, with errors that name the file and the record."""

    def __init__(self, root: Path, version: str) -> None:
        super().__init__(version=version, dataroot=str(root), verbose=False)

    @property
    def root(self) -> Path:
        """The folder that picture paths are relative to."""
        return Path(self.dataroot)

    def __load_table__(self, table_name: str) -> list[Record]:
        """In place of the devkit's reader, which says neither which file is broken nor what a table is."""
        records = read_json(self.path(table_name), _REPAIR)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise MagicDriveError(f"{self.path(table_name)} is no list of records", _REPAIR)
        return records

    def __make_reverse_index__(self, verbose: bool) -> None:
        """In place of the devkit's index, which knows no scene and stops at the first broken record."""
        self._token2ind: dict[str, dict[str, int]] = {}
        for table in self.table_names:
            rows = self._token2ind[table] = {}
            for row, record in enumerate(getattr(self, table)):
                if "token" not in record:
                    raise MagicDriveError(f"{self.path(table)}: the record in row {row} has no token", _REPAIR)
                rows[record["token"]] = row
        self._faults = link_records(self)

    def path(self, table: str) -> Path:
        """The file of a table."""
        return Path(self.table_root) / f"{table}.json"

    def getind(self, table_name: str, token: str) -> int:
        """The row of a record.

        Raises:
            MagicDriveError: the table has no such record.
        """
        try:
            return self._token2ind[table_name][token]
        except KeyError:
            raise MagicDriveError(
                f"{self.path(table_name)} has no record {token!r}, which another table names", _REPAIR
            ) from None

    def find(self, table: str, token: str | None) -> Record | None:
        """A record by its token; None where there is none."""
        row = self._token2ind[table].get(token or "")
        return None if row is None else getattr(self, table)[row]

    def follow(self, table: str, record: Record, field: str, to: str) -> Record:
        """The record of the table ``to`` that a field of a record names.

        Raises:
            MagicDriveError: the record has no such field, or ``to`` no such record.
        """
        token = self.field(table, record, field)
        row = self._token2ind[to].get(token)
        if row is None:
            raise MagicDriveError(
                f"{self.path(to)} has no record {token!r}, which {field} of record {record['token']} in"
                f" {self.path(table).name} names",
                _REPAIR,
            )
        found: Record = getattr(self, to)[row]
        return found

    def field(self, table: str, record: Record, name: str) -> Any:
        """A field of a record.

        Raises:
            MagicDriveError: the record has no such field.
        """
        if name not in record:
            raise MagicDriveError(f"{self.path(table)}: record {record.get('token')} has no {name}", _REPAIR)
        return record[name]

    def samples(self, scene: Record) -> list[Record]:
        """The key frames of a scene in time order.

        Raises:
            MagicDriveError: a record or field of the scene is missing, or a key frame is not later than the one
                before it.
        """
        if scene["token"] in self._faults:
            raise self._faults[scene["token"]]
        out: list[Record] = []
        sample = self.follow("scene", scene, "first_sample_token", "sample")
        while True:
            if out and self.time("sample", sample) <= self.time("sample", out[-1]):
                raise MagicDriveError(
                    f"{self.path('sample')}: timestamp of record {sample['token']} is not later than that of"
                    f" {out[-1]['token']}, which comes before it"
                )
            out.append(sample)
            if not self.field("sample", sample, "next"):
                return out
            sample = self.follow("sample", sample, "next", "sample")

    def time(self, table: str, record: Record) -> int:
        """A record's time stamp in microseconds.

        Raises:
            MagicDriveError: it has none, or one that is no whole number.
        """
        value = self.field(table, record, "timestamp")
        if not isinstance(value, int):
            raise MagicDriveError(
                f"{self.path(table)}: timestamp of record {record['token']} is {value!r}, not microseconds"
            )
        return value

    def sensor_records(self, scene: Record) -> dict[str, list[Record]]:
        """The ``sample_data`` records of a scene, key frames and sweeps, by channel in time order.

        Raises:
            MagicDriveError: a time stamp is none, or not later than that of the record before it.
        """
        channels = self._records.get(scene["token"], {})
        return {channel: self._in_time_order(records) for channel, records in channels.items()}

    def location(self, scene: Record) -> str:
        """The map that a scene drives on, for example singapore-onenorth."""
        log = self.follow("scene", scene, "log_token", "log")
        return str(self.field("log", log, "location"))

    def vectors(self, table: str, records: Sequence[Record], field: str, width: int) -> NDArray[np.float64]:
        """One field of N records of ``table`` as an array (N, width).

        Raises:
            MagicDriveError: a record's value is not ``width`` finite numbers.
        """
        for record in records:
            value = self.field(table, record, field)
            fits = isinstance(value, list) and len(value) == width
            if not fits or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
                raise MagicDriveError(
                    f"{self.path(table)}: {field} of record {record['token']} is not {width} finite numbers"
                )
            if field == "rotation" and not any(value):
                raise MagicDriveError(
                    f"{self.path(table)}: rotation of record {record['token']} is zero, not a quaternion"
                )
        return np.array([record[field] for record in records], np.float64).reshape(-1, width)

    def _in_time_order(self, records: list[Record]) -> list[Record]:
        """Records of one sensor by time stamp, which must be the order in which they name each other."""
        ordered = sorted(records, key=lambda record: self.time("sample_data", record))
        places = {record["token"]: place for place, record in enumerate(ordered)}
        for place, record in enumerate(ordered):
            if places.get(record.get("next", ""), place + 1) <= place:
                raise MagicDriveError(
                    f"{self.path('sample_data')}: timestamp of record {record['next']} is not later than that of"
                    f" {record['token']}, which comes before it"
                )
        return ordered

    @cached_property
    def _records(self) -> dict[str, dict[str, list[Record]]]:
        out: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in self.sample_data:
            sample = self.find("sample", record.get("sample_token"))
            if sample is not None and "channel" in record:  # else its scene has a fault, and is not read
                out[self.field("sample", sample, "scene_token")][record["channel"]].append(record)
        return out


def load_tables(root: Path | str, version: str) -> Tables:
    """Loads the 13 tables of ``root/version``.

    Raises:
        MagicDriveError: no such folder, a missing or broken table (named), a record that refers to a missing one.
    """
    folder = find_tables(root, version)
    try:
        return Tables(Path(root), version)
    except FileNotFoundError as error:  # of a map picture
        raise MagicDriveError(f"{error.filename} is missing", _REPAIR) from None
    except AssertionError as error:  # the devkit's way to say that a map picture is missing
        raise MagicDriveError(f"the tables in {folder} cannot be used: {error}", _REPAIR) from None
    except (KeyError, IndexError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise MagicDriveError(f"the tables in {folder} do not fit together ({fault})", _REPAIR) from None


def official_split(version: str) -> tuple[set[str], set[str]] | None:
    """Scene names of the official training and validation split; None where the devkit knows no split."""
    if version not in _OFFICIAL:
        return None
    splits = create_splits_scenes()
    train, val = _OFFICIAL[version]
    return set(splits[train]), set(splits[val])


def detection_class(category: str) -> str | None:
    """The detection class of a nuScenes category, None for categories that are not detected."""
    return category_to_detection_name(category)


_REPAIR = "unpack the nuScenes metadata archive again, or make generated data with `magicdrive synth`"


# How the records of nuScenes tables hang together, and to which scene each broken link belongs.
#
# The devkit's own index stops at the first broken record among 850 scenes. This one notes it for its scene and goes on.


def link_records(tables: Tables) -> dict[str, MagicDriveError]:
    """Adds to records what the devkit's index adds: ``category_name`` of annotations, ``channel`` of sensor records,
    ``data`` and ``anns`` of samples.

    Returns:
        the first fault of each scene that has one, by its token.

    Raises:
        MagicDriveError: a broken record belongs to no scene that can be found.
    """
    faults: dict[str, MagicDriveError] = {}
    for sample in tables.sample:
        sample["data"], sample["anns"] = {}, []
    for record in tables.sample_annotation:
        try:
            instance = tables.follow("sample_annotation", record, "instance_token", "instance")
            category = tables.follow("instance", instance, "category_token", "category")
            record["category_name"] = tables.field("category", category, "name")
            tables.follow("sample_annotation", record, "sample_token", "sample")["anns"].append(record["token"])
            _check_neighbours(tables, "sample_annotation", record)
        except MagicDriveError as error:
            faults.setdefault(_scene_of(tables, "sample_annotation", record, error), error)
    for record in tables.sample_data:
        try:
            calibration = tables.follow("sample_data", record, "calibrated_sensor_token", "calibrated_sensor")
            sensor = tables.follow("calibrated_sensor", calibration, "sensor_token", "sensor")
            record["channel"] = tables.field("sensor", sensor, "channel")
            sample = tables.follow("sample_data", record, "sample_token", "sample")
            if tables.field("sample_data", record, "is_key_frame"):
                sample["data"][record["channel"]] = record["token"]
            _check_neighbours(tables, "sample_data", record)
        except MagicDriveError as error:
            faults.setdefault(_scene_of(tables, "sample_data", record, error), error)
    return faults


def _check_neighbours(tables: Tables, table: str, record: Record) -> None:
    """A record that is missing between two others is known by them: a sensor that dropped a frame leaves no gap."""
    for direction in ("prev", "next"):
        if record.get(direction):
            tables.follow(table, record, direction, table)


def _scene_of(tables: Tables, table: str, record: Record, fault: MagicDriveError) -> str:
    """The scene of a broken record: of its sample, else of the nearest record of its chain that has one."""
    for direction in ("prev", "next"):
        near: Record | None = record
        passed: set[str] = set()
        while near is not None and near["token"] not in passed:
            passed.add(near["token"])
            sample = tables.find("sample", near.get("sample_token"))
            if sample is not None:
                return str(tables.field("sample", sample, "scene_token"))
            near = tables.find(table, near.get(direction))
    raise fault
