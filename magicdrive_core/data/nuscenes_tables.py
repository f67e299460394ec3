"""nuScenes tables of any root and version, scene by scene, with errors that name the file and the record.

``Tables`` reads each file once, record by record, and packs the records of the three large tables by scene: all of
nuScenes takes some hundred megabytes, not the many gigabytes of Python objects. ``SceneTables`` are the records of one
scene, checked: tokens stand once, references lead to records, and chains hold every record that tells their length.

Only tables, sensors and fields that this project uses are read. A broken record costs its own scene, not the others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from magicdrive_core.data.limits import check_positions, check_quaternions, check_sizes, is_number, is_time
from magicdrive_core.data.nuscenes_files import REPAIR, Record, find_tables, stream_records
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS

LIDAR = "LIDAR_TOP"
SENSORS = (LIDAR, *VIEWS)  # records of other sensors are not read
_SMALL = ("scene", "log", "sample", "sensor", "calibrated_sensor", "category", "instance")  # held as records
_LARGE = ("sample_data", "ego_pose", "sample_annotation")  # packed by scene
# The official splits for training and validation, by version.
_OFFICIAL = {"v1.0-trainval": ("train", "val"), "v1.0-mini": ("mini_train", "mini_val")}
_PENDING = 20_000  # records that are kept as texts before they are packed


class Tables:
    """The tables of a data root.

    Args:
        root: the data root.
        version: name of the table folder, such as "v1.0-mini".

    Raises:
        MagicDriveError: the folder is missing, a table is missing or not a list of records with tokens, or no scene
            can be found for a broken record.
    """

    def __init__(self, root: Path, version: str) -> None:
        self.root = root
        self._folder = find_tables(root, version)
        small = {table: [record for record, _ in stream_records(self.path(table))] for table in _SMALL}
        self.scene: list[Record] = small["scene"]
        self._rows = {table: _by_token(records) for table, records in small.items()}
        self._samples: dict[str, list[Record]] = defaultdict(list)  # by scene token
        for sample in small["sample"]:
            self._samples[_text(sample, "scene_token")].append(sample)
        for token in self._samples.keys() - self._rows["scene"].keys():
            raise MagicDriveError(
                f"{self.path('scene')} has no record {token!r}, which scene_token of record"
                f" {self._samples[token][0]['token']} in sample.json names",
                REPAIR,
            )
        self._packs = _Packs()
        self._strays: dict[str, MagicDriveError] = {}  # by scene token: a broken record that belongs to the scene
        self._pack()

    def path(self, table: str) -> Path:
        """Return the file of a table.

        Args:
            table: name of the table, such as "sample_data".

        Returns:
            The JSON file, whether it exists or not.
        """
        return self._folder / f"{table}.json"

    def of_scene(self, scene: Record) -> SceneTables:
        """Unpack and check the records of a scene.

        Args:
            scene: a record of ``scene``.

        Returns:
            The records.

        Raises:
            MagicDriveError: a record of the scene is missing, stands twice or contradicts another one.
        """
        if scene["token"] in self._strays:
            raise self._strays[scene["token"]]
        packed = {table: self._packs.records(scene["token"], table) for table in _LARGE}
        small = {table: self._rows[table] for table in _SMALL}
        return SceneTables(self._folder, scene, self._samples.get(scene["token"], []), small, packed)

    def _pack(self) -> None:
        """Read the large tables and hand each record to its scene."""
        channels = self._channels()
        homes = {sample["token"]: scene for scene, samples in self._samples.items() for sample in samples}
        poses: dict[str, str] = {}  # scene of each pose that is used
        shared: dict[str, set[str]] = defaultdict(set)  # the other scenes of a pose, if two share it
        strays: list[Record] = []
        for record, text in stream_records(self.path("sample_data")):
            if channels.get(_text(record, "calibrated_sensor_token"), LIDAR) not in SENSORS:
                continue
            scene = homes.get(_text(record, "sample_token"))
            if scene is None:
                strays.append(record)
                continue
            self._packs.add(scene, "sample_data", text)
            pose = _text(record, "ego_pose_token")
            if poses.setdefault(pose, scene) != scene:
                shared[pose].add(scene)
        self._adopt("sample_data", strays)
        for record, text in stream_records(self.path("ego_pose")):
            for scene in {poses.get(record["token"], "")} | shared.get(record["token"], set()):
                if scene:
                    self._packs.add(scene, "ego_pose", text)
        strays = []
        for record, text in stream_records(self.path("sample_annotation")):
            scene = homes.get(_text(record, "sample_token"))
            if scene is None:
                strays.append(record)
            else:
                self._packs.add(scene, "sample_annotation", text)
        self._adopt("sample_annotation", strays)
        self._packs.pack()

    def _channels(self) -> dict[str, str]:
        """Map each calibration to the channel of its sensor; broken calibrations are left out."""
        sensors = self._rows["sensor"]
        found = {
            token: sensors.get(_text(record, "sensor_token"))
            for token, record in self._rows["calibrated_sensor"].items()
        }
        return {token: _text(sensor, "channel") for token, sensor in found.items() if sensor is not None}

    def _adopt(self, table: str, strays: Sequence[Record]) -> None:
        """Give each record without a sample to the scene of the nearest linked record that has one."""
        if not strays:
            return
        lost = {record["token"]: record for record in strays}
        wanted = {_text(record, link) for record in strays for link in ("prev", "next")} - lost.keys()
        homes = {token: scene for scene, token in self._packs.tokens(table) if token in wanted}
        for record in strays:
            named = f"has no record {record['sample_token']!r}" if "sample_token" in record else ""
            fault = MagicDriveError(
                f"{self.path('sample')} {named}, which sample_token of record {record['token']} in {table}.json names"
                if named
                else f"{self.path(table)}: record {record['token']} has no sample_token",
                REPAIR,
            )
            scene = next((homes[token] for token in _linked(record, lost) if token in homes), None)
            if scene is None:
                raise fault
            self._strays.setdefault(scene, fault)


class SceneTables:
    """The records of one scene.

    Args:
        folder: the table folder, for messages.
        scene: the scene's record.
        samples: its key frames, in the order of the file.
        small: records of the small tables of all scenes by token; None for a token that stands twice.
        packed: the scene's records of the large tables.

    Raises:
        MagicDriveError: a record is missing, stands twice or contradicts another one; the message names it.
    """

    def __init__(
        self,
        folder: Path,
        scene: Record,
        samples: Sequence[Record],
        small: dict[str, dict[str, Record | None]],
        packed: dict[str, list[Record]],
    ) -> None:
        self.scene = scene
        self._folder, self._samples = folder, samples
        self._rows = small | {table: _by_token(records) for table, records in packed.items()}
        for table in _LARGE:
            self._check_tokens(table)
        self.follow("scene", scene, "token", "scene")
        self._tracks = self._link_sensors(packed["sample_data"])
        self._objects = self._link_objects(packed["sample_annotation"])

    def path(self, table: str) -> Path:
        """Return the file of a table.

        Args:
            table: name of the table, such as "sample_data".

        Returns:
            The JSON file.
        """
        return self._folder / f"{table}.json"

    def find(self, table: str, token: Any) -> Record:
        """Find a record by its token.

        Args:
            table: name of the table.
            token: token of the record.

        Returns:
            The record.

        Raises:
            MagicDriveError: the table holds no or several records of this token.
        """
        rows = self._rows[table]
        if not isinstance(token, str) or token not in rows:
            raise MagicDriveError(f"{self.path(table)} has no record {token!r}", REPAIR)
        found = rows[token]
        if found is None:
            raise MagicDriveError(f"{self.path(table)}: several records have the token {token!r}", REPAIR)
        return found

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
            MagicDriveError: the record lacks the field, or ``to`` holds no or several records of that token.
        """
        token = self.field(table, record, field)
        try:
            return self.find(to, token)
        except MagicDriveError as error:
            raise MagicDriveError(
                f"{error.message}, which {field} of record {record['token']} in {table}.json names", REPAIR
            ) from None

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
            raise MagicDriveError(f"{self.path(table)}: record {record['token']} has no {name}", REPAIR)
        return record[name]

    def text(self, table: str, record: Record, name: str) -> str:
        """Return a field that must be a text.

        Args:
            table: table of the record, for the message.
            record: the record.
            name: name of the field.

        Returns:
            The text.

        Raises:
            MagicDriveError: the record lacks the field, or it is no text.
        """
        value = self.field(table, record, name)
        if not isinstance(value, str):
            raise self._fault(table, record, name, f"is {value!r}, expected a text")
        return value

    def time(self, table: str, record: Record) -> int:
        """Return a record's time stamp.

        Args:
            table: table of the record, for the message.
            record: the record.

        Returns:
            Microseconds.

        Raises:
            MagicDriveError: the time stamp is missing or not a possible integer.
        """
        value = self.field(table, record, "timestamp")
        if not is_time(value):
            raise self._fault(table, record, "timestamp", f"is {value!r}, expected integer microseconds")
        return int(value)

    def vectors(self, table: str, records: Sequence[Record], field: str, width: int) -> NDArray[np.float64]:
        """Stack one field of N records.

        Args:
            table: table of the records.
            records: the N records.
            field: "translation", "rotation" or "size".
            width: how many numbers the field must hold.

        Returns:
            (N, width), in the unit of the table: metres, or quaternions (w, x, y, z).

        Raises:
            MagicDriveError: a record's field does not hold ``width`` finite numbers, or they are impossible.
        """
        for record in records:
            value = self.field(table, record, field)
            if not isinstance(value, list) or len(value) != width or not all(map(is_number, value)):
                raise self._fault(table, record, field, f"is not {width} finite numbers")
        values = np.array([record[field] for record in records], np.float64).reshape(-1, width)
        check = {"translation": check_positions, "rotation": check_quaternions, "size": check_sizes}[field]
        check(values, lambda row: f"{self.path(table)}: {field} of record {records[row]['token']}")
        return values

    def location(self) -> str:
        """Return the location of the scene, which names its map.

        Returns:
            The location of the scene's log, such as "singapore-onenorth".

        Raises:
            MagicDriveError: the log or its location is missing.
        """
        return self.text("log", self.follow("scene", self.scene, "log_token", "log"), "location")

    def samples(self) -> list[Record]:
        """List the key frames of the scene in order of time.

        Returns:
            The ``sample`` records, from the scene's first to the one without a ``next``.

        Raises:
            MagicDriveError: a record or field is missing, a key frame is not later than the previous one, or the chain
                is not all of the scene: it contradicts ``prev``, ``nbr_samples``, ``last_sample_token`` or the
                ``scene_token`` of a sample.
        """
        out: list[Record] = []
        sample = self.follow("scene", self.scene, "first_sample_token", "sample")
        while True:
            if self.field("sample", sample, "scene_token") != self.scene["token"]:
                raise self._fault(
                    "sample", sample, "scene_token", f"is not the scene {self.scene['token']} of its chain"
                )
            previous = out[-1]["token"] if out else ""
            if out and self.time("sample", sample) <= self.time("sample", out[-1]):
                raise self._fault(
                    "sample", sample, "timestamp", f"is not later than that of {previous}, the previous one"
                )
            if (self.field("sample", sample, "prev") or "") != previous:
                raise self._fault("sample", sample, "prev", f"is {sample['prev']!r}, but its chain says {previous!r}")
            out.append(sample)
            if not self.field("sample", sample, "next"):
                break
            sample = self.follow("sample", sample, "next", "sample")
        if len(out) != len(self._samples):
            raise MagicDriveError(
                f"{self.path('sample')}: {len(self._samples)} records name the scene {self.scene['token']}, but its"
                f" chain from first_sample_token holds {len(out)}",
                REPAIR,
            )
        for name, found in (("nbr_samples", len(out)), ("last_sample_token", out[-1]["token"])):
            if self.field("scene", self.scene, name) != found:
                raise self._fault("scene", self.scene, name, f"is {self.scene[name]!r}, but its chain says {found!r}")
        return out

    def sensor_records(self, channel: str) -> list[Record]:
        """List the ``sample_data`` records of a sensor, key frames and sweeps.

        Args:
            channel: the sensor, one of ``SENSORS``.

        Returns:
            The records in order of time; empty if there are none.

        Raises:
            MagicDriveError: a time stamp is missing, or not later than that of the previous record.
        """
        ordered = sorted(self._tracks.get(channel, []), key=lambda record: self.time("sample_data", record))
        rows = {record["token"]: row for row, record in enumerate(ordered)}
        for row, record in enumerate(ordered):
            following = record.get("next") or ""
            if rows.get(following, row + 1) <= row:
                raise MagicDriveError(
                    f"{self.path('sample_data')}: timestamp of record {following} is not later than that of"
                    f" {record['token']}, the previous one"
                )
        return ordered

    def objects(self, sample: Record) -> list[tuple[Record, str]]:
        """List the annotations of a key frame.

        Args:
            sample: record of the key frame.

        Returns:
            Each ``sample_annotation`` record, in the order of the file, and the name of its category.
        """
        return self._objects.get(sample["token"], [])

    def _check_tokens(self, table: str) -> None:
        for token, record in self._rows[table].items():
            if record is None:
                raise MagicDriveError(f"{self.path(table)}: several records have the token {token!r}", REPAIR)

    def _link_sensors(self, records: Iterable[Record]) -> dict[str, list[Record]]:
        """Sort the ``sample_data`` records by channel."""
        out: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            calibration = self.follow("sample_data", record, "calibrated_sensor_token", "calibrated_sensor")
            sensor = self.follow("calibrated_sensor", calibration, "sensor_token", "sensor")
            self._check_neighbours("sample_data", record)
            flag = self.field("sample_data", record, "is_key_frame")
            if not isinstance(flag, bool):
                raise self._fault("sample_data", record, "is_key_frame", f"is {flag!r}, expected true or false")
            out[self.text("sensor", sensor, "channel")].append(record)
        return out

    def _link_objects(self, records: Iterable[Record]) -> dict[str, list[tuple[Record, str]]]:
        """Sort the annotations by key frame; an object is there once, and in as many as its instance says."""
        out: dict[str, list[tuple[Record, str]]] = defaultdict(list)
        instances: dict[str, set[str]] = defaultdict(set)  # key frames of each instance
        for record in records:
            instance = self.follow("sample_annotation", record, "instance_token", "instance")
            category = self.follow("instance", instance, "category_token", "category")
            self._check_neighbours("sample_annotation", record)
            sample = record["sample_token"]
            if sample in instances[instance["token"]]:
                raise self._fault("sample_annotation", record, "instance_token", f"is twice in the sample {sample}")
            instances[instance["token"]].add(sample)
            out[sample].append((record, self.text("category", category, "name")))
        for token, found in instances.items():
            instance = self.find("instance", token)
            if self.field("instance", instance, "nbr_annotations") != len(found):
                count = instance["nbr_annotations"]
                raise self._fault("instance", instance, "nbr_annotations", f"is {count!r}, but {len(found)} name it")
        return out

    def _check_neighbours(self, table: str, record: Record) -> None:
        """Check that the neighbours of a record exist; one that the sensor dropped is not linked by its neighbours."""
        for direction in ("prev", "next"):
            if record.get(direction):
                self.follow(table, record, direction, table)

    def _fault(self, table: str, record: Record, field: str, fault: str) -> MagicDriveError:
        return MagicDriveError(f"{self.path(table)}: {field} of record {record['token']} {fault}", REPAIR)


class _Packs:
    """The texts of records by scene and table, compressed."""

    def __init__(self) -> None:
        self._pending: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._count = 0
        self._packed: dict[tuple[str, str], list[tuple[int, bytes]]] = defaultdict(list)

    def add(self, scene: str, table: str, text: str) -> None:
        """Add a record.

        Args:
            scene: token of the scene.
            table: name of the table.
            text: the record's JSON text.
        """
        self._pending[scene, table].append(text)
        self._count += 1
        if self._count >= _PENDING:
            self.pack()

    def pack(self) -> None:
        """Compress what was added since the last call."""
        for key, texts in self._pending.items():
            data = ",".join(texts).encode()
            self._packed[key].append((len(data), pa.compress(data, codec="zstd", asbytes=True)))
        self._pending.clear()
        self._count = 0

    def records(self, scene: str, table: str) -> list[Record]:
        """Unpack the records of a scene.

        Args:
            scene: token of the scene.
            table: name of the table.

        Returns:
            The records, in the order of the file.
        """
        self.pack()
        packs = self._packed.get((scene, table), [])
        texts = [pa.decompress(data, size, codec="zstd", asbytes=True) for size, data in packs]
        records: list[Record] = json.loads(b"[" + b",".join(texts) + b"]")
        return records

    def tokens(self, table: str) -> Iterator[tuple[str, str]]:
        """List the records of a table.

        Args:
            table: name of the table.

        Yields:
            Token of the scene, and token of the record.
        """
        self.pack()
        for scene in [scene for scene, packed in self._packed if packed == table]:
            for record in self.records(scene, table):
                yield scene, record["token"]


def load_tables(root: Path | str, version: str) -> Tables:
    """Load the tables of ``root/version``.

    Args:
        root: the data root.
        version: name of the table folder, such as "v1.0-mini".

    Returns:
        The tables; scenes with broken records are reported when they are read.

    Raises:
        MagicDriveError: the folder is missing, a table is missing or broken, or a record without a scene names a
            missing record.
    """
    return Tables(Path(root), version)


def official_split(version: str) -> tuple[set[str], set[str]] | None:
    """Return the official split of a version.

    Args:
        version: name of the table folder, such as "v1.0-mini".

    Returns:
        Names of the training and of the validation scenes; None if the devkit knows no such split.
    """
    if version not in _OFFICIAL:
        return None
    from nuscenes.utils.splits import create_splits_scenes  # the devkit takes seconds to import

    splits = create_splits_scenes()
    train, val = _OFFICIAL[version]
    return set(splits[train]), set(splits[val])


@cache
def detection_class(category: str) -> str | None:
    """Return the detection class of a nuScenes category.

    Args:
        category: name of the category, such as "vehicle.car".

    Returns:
        One of the ten classes, such as "car"; None for categories outside them.
    """
    from nuscenes.eval.detection.utils import category_to_detection_name  # the devkit takes seconds to import

    name: str | None = category_to_detection_name(category)
    return name


def _by_token(records: Iterable[Record]) -> dict[str, Record | None]:
    """Index records by token; None marks a token that stands twice."""
    out: dict[str, Record | None] = {}
    for record in records:
        out[record["token"]] = None if record["token"] in out else record
    return out


def _text(record: Record | None, field: str) -> str:
    """Return a field if it is a text, otherwise ""."""
    value = (record or {}).get(field)
    return value if isinstance(value, str) else ""


def _linked(record: Record, among: dict[str, Record]) -> Iterator[str]:
    """Walk from a record along its links through records of ``among``; yield every token on the way."""
    for direction in ("prev", "next"):
        token, passed = _text(record, direction), {record["token"]}
        while token and token not in passed:
            passed.add(token)
            yield token
            token = _text(among.get(token), direction)
