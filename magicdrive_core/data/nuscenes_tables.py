"""nuScenes tables through nuscenes-devkit, for any root and version, with errors that name the file and the record.

The devkit's own index stops at the first broken record among 850 scenes. This one assigns each broken record to its
scene, so that the other scenes can still be read.

Apart from the devkit's evaluation (``evaluation/detection.py``) this is the only module that imports the devkit, which
takes seconds: modules that only read artefacts import this one inside the functions that need it.
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
_REPAIR = "unpack the nuScenes metadata archive again, or make generated data with `magicdrive synth`"
# The official splits for training and validation, by version.
_OFFICIAL = {"v1.0-trainval": ("train", "val"), "v1.0-mini": ("mini_train", "mini_val")}


class Tables(NuScenes):
    """The devkit's tables, silent, with errors that name the file and the record.

    Args:
        root: the data root.
        version: name of the table folder.
    """

    def __init__(self, root: Path, version: str) -> None:
        super().__init__(version=version, dataroot=str(root), verbose=False)

    @property
    def root(self) -> Path:
        """The folder that picture paths are relative to."""
        return Path(self.dataroot)

    def __load_table__(self, table_name: str) -> list[Record]:
        """Override the devkit's reader, which does not say which file is broken and does not check its form."""
        records = read_json(self.path(table_name), _REPAIR)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise MagicDriveError(f"{self.path(table_name)} is not a list of records", _REPAIR)
        return records

    def __make_reverse_index__(self, verbose: bool) -> None:
        """Override the devkit's index, which stops at the first broken record."""
        self._token2ind: dict[str, dict[str, int]] = {}
        for table in self.table_names:
            rows = self._token2ind[table] = {}
            for row, record in enumerate(getattr(self, table)):
                if "token" not in record:
                    raise MagicDriveError(f"{self.path(table)}: the record in row {row} has no token", _REPAIR)
                rows[record["token"]] = row
        self._faults = link_records(self)

    def path(self, table: str) -> Path:
        """Return the file of a table.

        Args:
            table: name of the table, such as "sample_data".

        Returns:
            The JSON file, whether it exists or not.
        """
        return Path(self.table_root) / f"{table}.json"

    def getind(self, table_name: str, token: str) -> int:
        """Find the row of a record.

        Args:
            table_name: name of the table.
            token: token of the record.

        Returns:
            Index of the record in the table.

        Raises:
            MagicDriveError: the table does not hold the record.
        """
        try:
            return self._token2ind[table_name][token]
        except KeyError:
            raise MagicDriveError(
                f"{self.path(table_name)} has no record {token!r}, which another table names", _REPAIR
            ) from None

    def find(self, table: str, token: str | None) -> Record | None:
        """Find a record by its token.

        Args:
            table: name of the table.
            token: token of the record; None or "" finds nothing.

        Returns:
            The record; None if the table does not hold it.
        """
        row = self._token2ind[table].get(token or "")
        return None if row is None else getattr(self, table)[row]

    def follow(self, table: str, record: Record, field: str, to: str) -> Record:
        """Follow a reference from one table to another.

        Args:
            table: table of the record.
            record: the record that holds the reference.
            field: the field that holds the token of the other record.
            to: table of the other record.

        Returns:
            The other record.

        Raises:
            MagicDriveError: the record lacks the field, or ``to`` lacks the other record.
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
        """Return a field of a record.

        Args:
            table: table of the record, for the message.
            record: the record.
            name: name of the field.

        Returns:
            The value, as the JSON file holds it.

        Raises:
            MagicDriveError: the record lacks the field.
        """
        if name not in record:
            raise MagicDriveError(f"{self.path(table)}: record {record.get('token')} has no {name}", _REPAIR)
        return record[name]

    def samples(self, scene: Record) -> list[Record]:
        """List the key frames of a scene in order of time.

        Args:
            scene: the scene's record.

        Returns:
            The ``sample`` records, from the scene's first to the one without a ``next``.

        Raises:
            MagicDriveError: a record or field of the scene is missing, or a key frame is not later than the previous
                one.
        """
        if scene["token"] in self._faults:
            raise self._faults[scene["token"]]
        out: list[Record] = []
        sample = self.follow("scene", scene, "first_sample_token", "sample")
        while True:
            if out and self.time("sample", sample) <= self.time("sample", out[-1]):
                raise MagicDriveError(
                    f"{self.path('sample')}: timestamp of record {sample['token']} is not later than that of"
                    f" {out[-1]['token']}, the previous one"
                )
            out.append(sample)
            if not self.field("sample", sample, "next"):
                return out
            sample = self.follow("sample", sample, "next", "sample")

    def time(self, table: str, record: Record) -> int:
        """Return a record's time stamp.

        Args:
            table: table of the record, for the message.
            record: the record.

        Returns:
            Microseconds.

        Raises:
            MagicDriveError: the time stamp is missing or not an integer.
        """
        value = self.field(table, record, "timestamp")
        if not isinstance(value, int):
            raise MagicDriveError(
                f"{self.path(table)}: timestamp of record {record['token']} is {value!r}, expected integer microseconds"
            )
        return value

    def sensor_records(self, scene: Record) -> dict[str, list[Record]]:
        """Collect the ``sample_data`` records of a scene, key frames and sweeps.

        Args:
            scene: the scene's record.

        Returns:
            The records of each sensor in order of time, by channel, such as "CAM_FRONT".

        Raises:
            MagicDriveError: a time stamp is missing, or not later than that of the previous record.
        """
        channels = self._records.get(scene["token"], {})
        return {channel: self._in_time_order(records) for channel, records in channels.items()}

    def location(self, scene: Record) -> str:
        """Return the location of a scene, which names its map.

        Args:
            scene: the scene's record.

        Returns:
            The location of the scene's log, such as "singapore-onenorth".

        Raises:
            MagicDriveError: the log or its location is missing.
        """
        log = self.follow("scene", scene, "log_token", "log")
        return str(self.field("log", log, "location"))

    def vectors(self, table: str, records: Sequence[Record], field: str, width: int) -> NDArray[np.float64]:
        """Stack one field of N records.

        Args:
            table: table of the records.
            records: the N records.
            field: name of the field.
            width: how many numbers the field must hold.

        Returns:
            (N, width), in the unit of the table: metres, or quaternions (w, x, y, z).

        Raises:
            MagicDriveError: a record's field does not hold ``width`` finite numbers, or a rotation is zero.
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
                    f"{self.path(table)}: rotation of record {record['token']} is zero, expected a quaternion"
                )
        return np.array([record[field] for record in records], np.float64).reshape(-1, width)

    def _in_time_order(self, records: list[Record]) -> list[Record]:
        """Sort records of one sensor by time stamp, which must agree with their ``next`` links."""
        ordered = sorted(records, key=lambda record: self.time("sample_data", record))
        rows = {record["token"]: row for row, record in enumerate(ordered)}
        for row, record in enumerate(ordered):
            if rows.get(record.get("next", ""), row + 1) <= row:
                raise MagicDriveError(
                    f"{self.path('sample_data')}: timestamp of record {record['next']} is not later than that of"
                    f" {record['token']}, the previous one"
                )
        return ordered

    @cached_property
    def _records(self) -> dict[str, dict[str, list[Record]]]:
        out: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in self.sample_data:
            sample = self.find("sample", record.get("sample_token"))
            if sample is not None and "channel" in record:  # otherwise its scene has a fault and is not read
                out[self.field("sample", sample, "scene_token")][record["channel"]].append(record)
        return out


def load_tables(root: Path | str, version: str) -> Tables:
    """Load the 13 tables of ``root/version``.

    Args:
        root: the data root.
        version: name of the table folder, such as "v1.0-mini".

    Returns:
        The tables; scenes with broken records are reported when they are read.

    Raises:
        MagicDriveError: the folder is missing, a table is missing or broken, or a record without a scene names a
            missing record.
    """
    folder = find_tables(root, version)
    try:
        return Tables(Path(root), version)
    except FileNotFoundError as error:  # a map picture is missing
        raise MagicDriveError(f"{error.filename} is missing", _REPAIR) from None
    except AssertionError as error:  # the devkit asserts that map pictures exist
        raise MagicDriveError(f"the tables in {folder} are unusable: {error}", _REPAIR) from None
    except (KeyError, IndexError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise MagicDriveError(f"the tables in {folder} are inconsistent ({fault})", _REPAIR) from None


def official_split(version: str) -> tuple[set[str], set[str]] | None:
    """Return the official split of a version.

    Args:
        version: name of the table folder, such as "v1.0-mini".

    Returns:
        Names of the training and of the validation scenes; None if the devkit knows no such split.
    """
    if version not in _OFFICIAL:
        return None
    splits = create_splits_scenes()
    train, val = _OFFICIAL[version]
    return set(splits[train]), set(splits[val])


def detection_class(category: str) -> str | None:
    """Return the detection class of a nuScenes category.

    Args:
        category: name of the category, such as "vehicle.car".

    Returns:
        One of the ten classes, such as "car"; None for categories outside them.
    """
    return category_to_detection_name(category)


def link_records(tables: Tables) -> dict[str, MagicDriveError]:
    """Add the fields that the devkit's index adds to records, in place.

    These are ``category_name`` of annotations, ``channel`` of sensor records, ``data`` and ``anns`` of samples.

    Args:
        tables: the tables, whose index of tokens is complete.

    Returns:
        The first fault of each scene that has one, by the scene's token.

    Raises:
        MagicDriveError: no scene can be found for a broken record.
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
    """Check that the neighbours of a record exist; a frame that the sensor dropped is not linked by its neighbours."""
    for direction in ("prev", "next"):
        if record.get(direction):
            tables.follow(table, record, direction, table)


def _scene_of(tables: Tables, table: str, record: Record, fault: MagicDriveError) -> str:
    """Find the scene of a broken record: that of its sample, or of the nearest linked record that has a sample."""
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
