"""nuScenes tables through nuscenes-devkit, for any root and version.

The only importer of the devkit but for its own evaluation (``scores/detection.py``). It takes seconds to import:
modules that merely read artefacts import this one inside the functions that need it.
"""

from __future__ import annotations

import json
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

from magicdrive_core.data.roots import find_tables
from magicdrive_core.errors import MagicDriveError

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

    def getind(self, table_name: str, token: str) -> int:
        """The row of a record.

        Raises:
            MagicDriveError: the table has no such record.
        """
        try:
            return self._token2ind[table_name][token]
        except KeyError:
            table = Path(self.table_root) / f"{table_name}.json"
            raise MagicDriveError(f"{table} has no record {token!r}, which another table names", _REPAIR) from None

    def field(self, table: str, record: Record, name: str) -> Any:
        """A field of a record.

        Raises:
            MagicDriveError: the record has no such field.
        """
        if name not in record:
            path = Path(self.table_root) / f"{table}.json"
            raise MagicDriveError(f"{path}: record {record.get('token')} has no {name}", _REPAIR)
        return record[name]

    def samples(self, scene: Record) -> list[Record]:
        """The key frames of a scene in time order.

        Raises:
            MagicDriveError: a record or field is missing, or a key frame is not later than the one before it.
        """
        out: list[Record] = []
        token = self.field("scene", scene, "first_sample_token")
        while token:
            sample = self.get("sample", token)
            time = self.time("sample", sample)
            if out and time <= out[-1]["timestamp"]:
                path = Path(self.table_root) / "sample.json"
                raise MagicDriveError(f"{path}: timestamp of record {token} is not later than that of the one before")
            out.append(sample)
            token = self.field("sample", sample, "next")
        return out

    def time(self, table: str, record: Record) -> int:
        """A record's time stamp in microseconds.

        Raises:
            MagicDriveError: it has none, or one that is no whole number.
        """
        value = self.field(table, record, "timestamp")
        if not isinstance(value, int):
            path = Path(self.table_root) / f"{table}.json"
            raise MagicDriveError(f"{path}: timestamp of record {record['token']} is {value!r}, not microseconds")
        return value

    def sensor_records(self, scene: Record) -> dict[str, list[Record]]:
        """The ``sample_data`` records of a scene, key frames and sweeps, by channel in time order."""
        return self._records.get(scene["token"], {})

    def location(self, scene: Record) -> str:
        """The map that a scene drives on, for example singapore-onenorth."""
        log = self.get("log", self.field("scene", scene, "log_token"))
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
                path = Path(self.table_root) / f"{table}.json"
                raise MagicDriveError(f"{path}: {field} of record {record['token']} is not {width} finite numbers")
            if field == "rotation" and not any(value):
                path = Path(self.table_root) / f"{table}.json"
                raise MagicDriveError(f"{path}: rotation of record {record['token']} is zero, not a quaternion")
        return np.array([record[field] for record in records], np.float64).reshape(-1, width)

    @cached_property
    def _records(self) -> dict[str, dict[str, list[Record]]]:
        out: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in self.sample_data:
            scene = self.get("sample", record["sample_token"])["scene_token"]
            out[scene][record["channel"]].append(record)
        for channels in out.values():
            for records in channels.values():
                records.sort(key=lambda record: record["timestamp"])
        return out


def load_tables(root: Path | str, version: str) -> Tables:
    """Loads the 13 tables of ``root/version``.

    Raises:
        MagicDriveError: no such folder, a missing or broken table (named), a record that refers to a missing one.
    """
    folder = find_tables(root, version)
    try:
        return Tables(Path(root), version)
    except FileNotFoundError as error:
        raise MagicDriveError(f"{error.filename} is missing", _REPAIR) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MagicDriveError(f"{_broken_table(folder)} is not valid JSON: {error}", _REPAIR) from None
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


def _broken_table(folder: Path) -> Path:
    """The first table that is no JSON: the devkit does not say which."""
    for table in sorted(folder.glob("*.json")):
        try:
            json.loads(table.read_text(encoding="utf-8"))
        except ValueError:
            return table
    return folder
