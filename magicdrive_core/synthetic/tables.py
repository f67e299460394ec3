"""The 13 nuScenes tables of a generated data set, and the lidar files of its scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import repeat
from numpy.typing import NDArray

from magicdrive_core.data.nuscenes_files import TABLES
from magicdrive_core.geometry import poses
from magicdrive_core.synthetic.lidar import scan
from magicdrive_core.synthetic.map_expansion import mask_name
from magicdrive_core.synthetic.rig import (
    CAMERA_STEPS,
    KEY_PERIOD,
    LIDAR,
    LIDAR_STEPS,
    SENSORS,
    Sensor,
    heading_quaternion,
    rounded,
    token,
)
from magicdrive_core.synthetic.traffic import SIZES, Actor, ScenePlan

Record = dict[str, Any]
Rows = dict[str, list[Record]]  # by table

ATTRIBUTES = (
    "cycle.with_rider", "cycle.without_rider", "pedestrian.moving", "pedestrian.standing",
    "pedestrian.sitting_lying_down", "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip
VISIBILITY = (("1", "v0-40", 0.4), ("2", "v40-60", 0.6), ("3", "v60-80", 0.8), ("4", "v80-100", 1.0))
ANNOTATED = 65.0  # metres from the ego car within which objects are annotated
JITTER = 600  # microseconds that sweeps are early or late at most
KEY_AZIMUTHS, SWEEP_AZIMUTHS = 360, 60  # lidar columns of key frames and of other sweeps


def fixed_rows(locations: Sequence[str], plans: Sequence[ScenePlan]) -> Rows:
    """Make the tables that do not depend on the events of a scene.

    Args:
        locations: locations of the data set, each with one map.
        plans: all scenes of the data set, each with one log.

    Returns:
        The records of attributes, categories, sensors, calibrations, visibility, maps and logs, by table.
    """
    return {
        "attribute": [{"token": token("attribute", n), "name": n, "description": ""} for n in ATTRIBUTES],
        "category": [
            {"token": token("category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(SIZES, 1)
        ],
        "sensor": [
            {
                "token": token("sensor", sensor.channel),
                "channel": sensor.channel,
                "modality": "camera" if sensor.is_camera else "lidar",
            }
            for sensor in SENSORS
        ],
        "calibrated_sensor": [
            {
                "token": token("calibrated_sensor", sensor.channel),
                "sensor_token": token("sensor", sensor.channel),
                "translation": list(sensor.translation),
                "rotation": list(sensor.rotation),
                "camera_intrinsic": sensor.intrinsic,
            }
            for sensor in SENSORS
        ],
        "visibility": [{"token": key, "level": level, "description": ""} for key, level, _ in VISIBILITY],
        "map": [
            {
                "token": token("map", location),
                "category": "semantic_prior",
                "filename": mask_name(location),
                "log_tokens": [token("log", plan.name) for plan in plans if plan.location == location],
            }
            for location in locations
        ],
        "log": [
            {
                "token": token("log", plan.name),
                "logfile": _log_name(plan),
                "vehicle": "demo",
                "date_captured": "2023-11-14",
                "location": plan.location,
            }
            for plan in plans
        ],
    }


def scene_rows(plan: ScenePlan, scenery: NDArray[np.float64]) -> tuple[Rows, dict[str, bytes]]:
    """Make the records and lidar files of one scene.

    Args:
        plan: the scene.
        scenery: (N, 7) boxes of buildings, trees and lamps, which occlude objects.

    Returns:
        The records by table, and the content of each lidar file by path below the data root.
    """
    samples = [token("sample", plan.name, key) for key in range(plan.key_frames)]
    times = [plan.first_time + key * KEY_PERIOD for key in range(plan.key_frames)]
    rows: Rows = {table: [] for table in TABLES}
    rows["sample"] = [
        {"token": name, "timestamp": time, "scene_token": token("scene", plan.name)}
        for name, time in zip(samples, times, strict=True)
    ]
    _link(rows["sample"])
    rows["scene"] = [
        {
            "token": token("scene", plan.name),
            "log_token": token("log", plan.name),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "name": plan.name,
            "description": plan.description,
        }
    ]
    for sensor in SENSORS:
        records, ego_poses = _sensor_records(plan, sensor, samples)
        rows["sample_data"] += records
        rows["ego_pose"] += ego_poses
    files, returns = _lidar_files(plan, rows, scenery)
    _annotate(plan, rows, samples, times, returns)
    return rows, files


def merge(parts: Sequence[Rows]) -> Rows:
    """Concatenate the records of all parts, by table.

    Args:
        parts: records by table; a part may lack tables.

    Returns:
        The records of all 13 tables.
    """
    return {table: [row for part in parts for row in part.get(table, [])] for table in TABLES}


def _log_name(plan: ScenePlan) -> str:
    return f"demo-{plan.name[-4:]}"


def _sensor_records(plan: ScenePlan, sensor: Sensor, samples: list[str]) -> tuple[list[Record], list[Record]]:
    """Make the ``sample_data`` and ``ego_pose`` records of one sensor: key frames, and sweeps at the sensor's rate."""
    steps = CAMERA_STEPS if sensor.is_camera else LIDAR_STEPS
    rng = np.random.default_rng([plan.index, SENSORS.index(sensor)])
    records, ego_poses = [], []
    for count in range((plan.key_frames - 1) * steps + 1):
        key, step = divmod(count, steps)
        time = plan.first_time + key * KEY_PERIOD + step * KEY_PERIOD // steps + sensor.delay
        time += int(rng.integers(-JITTER, JITTER + 1)) if step else 0
        folder, ending = ("sweeps" if step else "samples"), ("jpg" if sensor.is_camera else "pcd.bin")
        name = token("sample_data", plan.name, sensor.channel, count)
        height, width = sensor.size
        records.append(
            {
                "token": name,
                # A sweep belongs to the key frame that is nearest in time, as in nuScenes.
                "sample_token": samples[key + (2 * step > steps)],
                "ego_pose_token": name,
                "calibrated_sensor_token": token("calibrated_sensor", sensor.channel),
                "timestamp": time,
                "fileformat": "jpg" if sensor.is_camera else "pcd",
                "is_key_frame": step == 0,
                "height": height,
                "width": width,
                "filename": f"{folder}/{sensor.channel}/{_log_name(plan)}__{sensor.channel}__{time}.{ending}",
            }
        )
        x, y, heading = plan.ego_poses(np.array([time]))[0]
        ego_poses.append(
            {
                "token": name,
                "timestamp": time,
                "rotation": heading_quaternion(heading),
                "translation": [*rounded([x, y]), 0.0],
            }
        )
    _link(records)
    return records, ego_poses


def _lidar_files(
    plan: ScenePlan, rows: Rows, scenery: NDArray[np.float64]
) -> tuple[dict[str, bytes], list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Scan the scene with the lidar.

    Returns:
        The content of each lidar file by path; and, for each key frame, the numbers of returns from each actor and of
        rays that would meet it without occlusion.
    """
    lidar = next(sensor for sensor in SENSORS if sensor.channel == LIDAR)
    lidar_to_ego = poses.pose(lidar.rotation, lidar.translation)
    ego = {row["token"]: row for row in rows["ego_pose"]}
    records = [row for row in rows["sample_data"] if row["fileformat"] == "pcd"]
    seconds = np.array([(row["timestamp"] - plan.first_time) / 1e6 for row in records])
    actors = np.stack([_boxes(actor, seconds) for actor in plan.traffic.actors], axis=1)  # (records, actors, 7)
    files: dict[str, bytes] = {}
    returns = []
    for row, moving in zip(records, actors, strict=True):
        pose = ego[row["ego_pose_token"]]
        lidar_to_global = poses.pose(pose["rotation"], pose["translation"]) @ lidar_to_ego
        columns = KEY_AZIMUTHS if row["is_key_frame"] else SWEEP_AZIMUTHS
        sweep = scan(np.concatenate([moving, scenery]), lidar_to_global, columns)
        files[row["filename"]] = sweep.points.tobytes()
        if row["is_key_frame"]:
            returns.append((sweep.hits[: len(moving)], sweep.rays[: len(moving)]))
    return files, returns


def _boxes(actor: Actor, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the box (T, 7) of an actor at times (T,): centre, w, l, h, heading."""
    track = actor.poses(seconds)
    height = np.full(len(seconds), actor.size[2] / 2)
    sizes = repeat(np.array(actor.size), "c -> t c", t=len(seconds))
    return np.column_stack([np.round(track[:, :2], 4), height, sizes, track[:, 2]])


def _annotate(
    plan: ScenePlan,
    rows: Rows,
    samples: list[str],
    times: list[int],
    returns: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> None:
    """Add instances and their annotations, from the first to the last key frame near the ego car."""
    stamps = np.array(times)
    ego = plan.ego_poses(stamps)
    for number, actor in enumerate(plan.traffic.actors):
        track = actor.poses((stamps - plan.first_time) / 1e6)
        near = np.flatnonzero(np.linalg.norm(track[:, :2] - ego[:, :2], axis=1) < ANNOTATED)
        if not near.size:
            continue
        instance = token("instance", plan.name, number)
        records = []
        for key in range(near[0], near[-1] + 1):
            hits, rays = (int(counts[number]) for counts in returns[key])
            share = hits / rays if rays else 0.0
            records.append(
                {
                    "token": token("sample_annotation", plan.name, number, key),
                    "sample_token": samples[key],
                    "instance_token": instance,
                    "visibility_token": next(name for name, _, most in VISIBILITY if share <= most),
                    "attribute_tokens": [token("attribute", actor.attribute)] if actor.attribute else [],
                    "translation": rounded([*track[key, :2], actor.size[2] / 2]),
                    "size": list(actor.size),
                    "rotation": heading_quaternion(track[key, 2]),
                    "num_lidar_pts": hits,
                    "num_radar_pts": 0,
                }
            )
        _link(records)
        rows["sample_annotation"] += records
        rows["instance"].append(
            {
                "token": instance,
                "category_token": token("category", actor.category),
                "nbr_annotations": len(records),
                "first_annotation_token": records[0]["token"],
                "last_annotation_token": records[-1]["token"],
            }
        )


def _link(records: list[Record]) -> None:
    """Link records by ``prev`` and ``next``."""
    for before, after in zip([None, *records], [*records, None], strict=True):
        if before is not None:
            before["next"] = after["token"] if after is not None else ""
        if after is not None:
            after["prev"] = before["token"] if before is not None else ""
