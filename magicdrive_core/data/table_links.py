"""How the records of nuScenes tables hang together, and to which scene each broken link belongs.

The devkit's own index stops at the first broken record among 850 scenes. This one notes it for its scene and goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from magicdrive_core.errors import MagicDriveError

if TYPE_CHECKING:
    from magicdrive_core.data.nuscenes import Record, Tables


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
