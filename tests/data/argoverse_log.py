"""Write a small Argoverse 2 log: three seconds of a turning ego car, a parked car, a pedestrian, and a map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
from PIL import Image

from magicdrive_core.geometry import poses

LOG = "0a1b2c3d"
PARKED, WALKER = np.array([1020.0, 2004.0, 1.0]), np.array([1010.0, 1995.0, 1.0])
WALK = np.array([0.0, 1.5, 0.0])  # metres per second
SWEEPS = 31  # at 10 Hz
START = 315_966_000_000_000_000  # nanoseconds
YAWS = {
    "ring_front_center": 0,
    "ring_front_left": 45,
    "ring_front_right": -45,
    "ring_side_left": 99,
    "ring_side_right": -99,
    "ring_rear_left": 153,
    "ring_rear_right": -153,
}
FOCAL = 1700.0


def size_of(camera: str) -> tuple[int, int]:
    """Return width and height; the front camera is in portrait format like the real one."""
    return (1550, 2048) if camera == "ring_front_center" else (2048, 1550)


def ego_pose(seconds: float) -> np.ndarray:
    """Compute ego to city: 8 m/s along a gentle left turn."""
    heading = 0.1 * seconds
    rotation = [np.cos(heading / 2), 0, 0, np.sin(heading / 2)]
    return poses.pose(rotation, [1000 + 80 * np.sin(heading), 2000 + 80 * (1 - np.cos(heading)), 10.0])


def camera_pose(camera: str) -> np.ndarray:
    """Compute camera to ego: z forward, x right, y down."""
    yaw = np.radians(YAWS[camera])
    forward, left = np.array([np.cos(yaw), np.sin(yaw), 0]), np.array([-np.sin(yaw), np.cos(yaw), 0])
    return poses.pose(np.stack([-left, [0, 0, -1.0], forward], axis=1), 1.5 * forward + [0, 0, 1.4])


def _columns(matrices: np.ndarray) -> dict[str, np.ndarray]:
    quaternions = poses.quaternion(matrices[:, :3, :3])
    columns = {name: quaternions[:, index] for index, name in enumerate(("qw", "qx", "qy", "qz"))}
    return columns | {name: matrices[:, index, 3] for index, name in enumerate(("tx_m", "ty_m", "tz_m"))}


def _write(path: Path, columns: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pa.table(columns), path)


def write_log(root: Path, version: str = "val", log: str = LOG) -> Path:
    """Write ``root/version/log`` and return it."""
    folder = root / version / log
    start = START
    fine = np.arange(0, SWEEPS / 10, 0.01)
    moments = start + np.rint(fine * 1e9).astype(np.int64)
    _write(
        folder / "city_SE3_egovehicle.feather",
        {"timestamp_ns": moments, **_columns(np.stack([ego_pose(second) for second in fine]))},
    )
    rows: dict[str, list[object]] = {"timestamp_ns": [], "track_uuid": [], "category": []}
    sizes, object_poses = [], []
    for sweep in range(SWEEPS):
        second = sweep / 10
        to_ego = poses.inverse(ego_pose(second))
        for token, category, centre, size in (
            ("parked", "REGULAR_VEHICLE", PARKED, (4.5, 1.9, 1.6)),
            ("walker", "PEDESTRIAN", WALKER + second * WALK, (0.7, 0.6, 1.8)),
            ("sign", "SIGN", PARKED, (0.1, 0.5, 0.5)),  # none of the ten classes
        ):
            rows["timestamp_ns"].append(start + sweep * 100_000_000)
            rows["track_uuid"].append(token)
            rows["category"].append(category)
            sizes.append(size)
            object_poses.append(to_ego @ poses.pose([1.0, 0, 0, 0], [*centre[:2], centre[2] + 10]))
    lengths = {name: np.array(sizes)[:, index] for index, name in enumerate(("length_m", "width_m", "height_m"))}
    _write(folder / "annotations.feather", {**rows, **lengths, **_columns(np.stack(object_poses))})
    cameras = [*YAWS]
    sensors = np.stack([*(camera_pose(camera) for camera in cameras), poses.pose([1.0, 0, 0, 0], [1.3, 0, 1.6])])
    _write(
        folder / "calibration/egovehicle_SE3_sensor.feather",
        {"sensor_name": [*cameras, "up_lidar"], **_columns(sensors)},
    )
    widths, heights = (np.array([size_of(camera)[index] for camera in cameras]) for index in (0, 1))
    _write(
        folder / "calibration/intrinsics.feather",
        {
            "sensor_name": cameras,
            "fx_px": np.full(7, FOCAL),
            "fy_px": np.full(7, FOCAL),
            "cx_px": widths / 2 + 3,
            "cy_px": heights / 2 - 5,
            "height_px": heights.astype(np.uint32),
            "width_px": widths.astype(np.uint32),
        },
    )
    for camera in cameras:
        pixels = folder / "sensors/cameras" / camera
        pixels.mkdir(parents=True)
        first = pixels / f"{start + 3_000_000}.jpg"
        Image.new("RGB", size_of(camera), (90, 90, 90)).save(first)
        for shot in range(1, SWEEPS * 2):  # 20 Hz, 3 ms late
            (pixels / f"{start + 3_000_000 + shot * 50_000_000}.jpg").hardlink_to(first)
    _write_map(folder / f"map/log_map_archive_{log}____PIT_city_57819.json")
    return folder


def _write_map(path: Path) -> None:
    def vertices(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"x": x, "y": y, "z": 10.0} for x, y in points]

    values = {
        "drivable_areas": {
            "1": {"area_boundary": vertices((980, 1990), (1100, 1990), (1100, 2010), (980, 2010)), "id": 1}
        },
        "pedestrian_crossings": {
            "2": {"edge1": vertices((1010, 1990), (1010, 2010)), "edge2": vertices((1014, 1990), (1014, 2010)), "id": 2}
        },
        "lane_segments": {
            "3": {
                "left_lane_boundary": vertices((980, 2000), (1100, 2000)),
                "left_lane_mark_type": "DOUBLE_SOLID_YELLOW",
                "right_lane_boundary": vertices((980, 1996), (1100, 1996)),
                "right_lane_mark_type": "DASHED_WHITE",
            },
            "4": {
                "left_lane_boundary": vertices((980, 1993), (1100, 1993)),
                "left_lane_mark_type": "NONE",
                "right_lane_boundary": vertices((980, 1991), (1100, 1991)),
                "right_lane_mark_type": "NONE",
            },
        },
    }
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
