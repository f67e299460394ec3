"""The Argoverse 2 adapter: sensor logs in ``root/version/<log id>/``.

Sweeps are annotated at 10 Hz. The one nearest to every half second is a key frame; the half second between two key
frames is cut into six, boxes are interpolated between neighbouring sweeps, and a camera's picture is the one nearest in
time. The ring has seven cameras for six views: the rear left one is not used (``CAMERAS``). Pictures are not 16:9:
views show their largest central 16:9 window (``cameras.full_window``). Maps hold drivable areas, crossings and painted
lane boundaries.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
from numpy.typing import NDArray

from magicdrive_core.config.schema import fingerprint
from magicdrive_core.data.limits import (
    check_intrinsics,
    check_offsets,
    check_positions,
    check_quaternions,
    check_sizes,
    check_times,
    is_number,
    is_time,
)
from magicdrive_core.data.records import MAP_LAYERS, Scene
from magicdrive_core.data.timeline import SUFFIXES, Grid, Objects, SensorTrack, interpolate
from magicdrive_core.data.vector_maps import VectorMap
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_WIDTH, full_window
from magicdrive_core.utils.files import read_json, sha256_file

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Config

Floats = NDArray[np.float64]

KEY_EVERY = 5  # sweeps from key frame to key frame: 2 Hz
KEY_PERIOD, KEY_WITHIN = 500_000_000, 60_000_000  # nanoseconds between key frames, and how far their sweeps may be off
POSE_WITHIN = 0.05e6  # microseconds that a sensor may work before the first or after the last ego pose
LIDAR = "up_lidar"
CAMERAS = (  # in the order of cameras.VIEWS
    "ring_front_left",
    "ring_front_center",
    "ring_front_right",
    "ring_side_right",
    "ring_rear_right",
    "ring_side_left",
)
CATEGORY_CLASSES = {  # classes of the annotated categories; other categories are left out
    "REGULAR_VEHICLE": "car",
    "LARGE_VEHICLE": "truck",
    "BOX_TRUCK": "truck",
    "TRUCK": "truck",
    "TRUCK_CAB": "truck",
    "VEHICULAR_TRAILER": "trailer",
    "MESSAGE_BOARD_TRAILER": "trailer",
    "BUS": "bus",
    "SCHOOL_BUS": "bus",
    "ARTICULATED_BUS": "bus",
    "MOTORCYCLE": "motorcycle",
    "BICYCLE": "bicycle",
    "PEDESTRIAN": "pedestrian",
    "OFFICIAL_SIGNALER": "pedestrian",
    "CONSTRUCTION_CONE": "traffic_cone",
    "CONSTRUCTION_BARREL": "traffic_cone",
}
_TEXTS = ("sensor_name", "track_uuid", "category")
_QUATERNION, _TRANSLATION = ("qw", "qx", "qy", "qz"), ("tx_m", "ty_m", "tz_m")


class Argoverse:
    """The ``adapters.Adapter`` of logs below ``data.root``/``data.version``; a scene's name is the id of its log.

    Args:
        config: the whole configuration; its data section is used.
        project: the project's folder, which ``data.root`` is relative to.
    """

    def __init__(self, config: Config, project: Path) -> None:
        self.root = project / config.data.root
        self._version = config.data.version

    def names(self) -> list[str]:
        """List the folders that hold annotations.

        Returns:
            Ids of logs, sorted.

        Raises:
            MagicDriveError: there is no such folder.
        """
        folder = self.root / self._version
        names = sorted(path.parent.name for path in folder.glob("*/annotations.feather"))
        if not names:
            raise MagicDriveError(f"{folder} holds no log with annotations.feather", "set data.root and data.version")
        return names

    def read(self, name: str, split: str) -> Scene:
        """Read one log at 12 Hz.

        Args:
            name: id of the log.
            split: "train", "val" or "both", stored in the scene.

        Returns:
            The scene; the id of the log is its name and token, the city of the log's map its location.

        Raises:
            MagicDriveError: a file, column, sensor or picture is missing, or a value is impossible.
        """
        log = _Log(self.root / self._version / name)
        return log.scene(self.root, split)

    def pictures(self, scene: Scene) -> dict[str, tuple[int, int]]:
        """Return picture sizes as ``intrinsics.feather`` states them.

        Args:
            scene: a scene that ``read`` returned.

        Returns:
            (width, height) in pixels of the whole picture, by path below the root.
        """
        sizes = _Log(self.root / self._version / scene.name).picture_sizes
        return {path: sizes[camera] for views in scene.pictures for camera, path in zip(CAMERAS, views, strict=True)}

    def digest(self) -> str:
        """Digest poses, calibration, annotations, and the names of pictures.

        Returns:
            64 hex digits.
        """
        logs = [self.root / self._version / name for name in self.names()]
        pictures = [file.relative_to(self.root).as_posix() for log in logs for file in log.glob("sensors/cameras/*/*")]
        return fingerprint(sorted(pictures), self._files("*.feather"), self._files("calibration/*.feather"))

    def map_digest(self) -> str:
        """Digest the maps of all logs.

        Returns:
            64 hex digits.
        """
        return fingerprint(self._files("map/log_map_archive_*.json"))

    def _files(self, pattern: str) -> dict[str, str]:
        """Digest each file of the logs that matches a pattern, by path below the root."""
        files = sorted((self.root / self._version).glob(f"*/{pattern}"))
        return {file.relative_to(self.root).as_posix(): sha256_file(file) for file in files}

    def vector_map(self, scene: Scene) -> VectorMap:
        """Read the map of the scene's log.

        Args:
            scene: the scene, named by its log.

        Returns:
            Drivable areas, crossings and painted lane boundaries, in metres of the log's city frame.

        Raises:
            MagicDriveError: the map is missing or lacks a field.
        """
        return _Log(self.root / self._version / scene.name).vector_map()


class _Log:
    """The files of one log, read on demand.

    Args:
        folder: the folder of the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scene(self, root: Path, split: str) -> Scene:
        """Build the scene of the log at 12 Hz.

        Args:
            root: the data root, which picture paths are relative to.
            split: "train", "val" or "both", stored in the scene.

        Returns:
            The scene. Its lidar frame is at the upper lidar, with the axes of nuScenes (x right, y forward).

        Raises:
            MagicDriveError: the log has fewer than six annotated sweeps, a file, column, sensor or picture is missing,
                a number is impossible, or no record of a sensor is near a frame.
        """
        sweeps = np.unique(self._annotations["timestamp_ns"])
        if len(sweeps) <= KEY_EVERY:
            raise MagicDriveError(f"{self.folder}/annotations.feather has {len(sweeps)} sweeps, expected at least 6")
        key_sweeps = self._key_sweeps(sweeps)
        key_times = key_sweeps // 1000
        grid = Grid.between(key_times, published=False)
        times = np.rint(grid.interpolate(key_times)).astype(np.int64)
        ego_to_global = self._ego_at(times)
        # A lidar frame with the axes of nuScenes (x right, y forward) at the position of the upper lidar.
        lidar_to_ego = poses.pose([np.sqrt(0.5), 0, 0, -np.sqrt(0.5)], self._sensor_to_ego(LIDAR)[:3, 3])
        lidar_to_ego = np.broadcast_to(lidar_to_ego, (len(times), 4, 4)).copy()
        global_to_lidar = poses.inverse(ego_to_global @ lidar_to_ego)
        pictures, camera_to_global = [], []
        for camera in CAMERAS:
            files = self._pictures(camera)
            taken = np.array([int(file.stem) // 1000 for file in files], np.int64)
            nearest = np.abs(taken[None] - times[:, None]).argmin(1)
            check_offsets(taken[nearest], times, f"{self.folder}/sensors/cameras/{camera}", "complete the download")
            pictures.append([files[index].relative_to(root).as_posix() for index in nearest])
            camera_to_global.append(self._ego_at(taken[nearest]) @ self._sensor_to_ego(camera))
        objects = self._objects(sweeps, times)
        name, intrinsics = self.folder.name, np.stack([self._matrix(camera) for camera in CAMERAS])
        keys = [str(sweep) for sweep in key_sweeps]
        return Scene(
            token=name,
            name=name,
            split=split,
            location=self._map_file.stem.split("____")[-1].split("_")[0],
            description="Argoverse 2 log",
            tokens=[
                keys[key] + (SUFFIXES[step] if step else "") for key, step in zip(grid.keys, grid.steps, strict=True)
            ],
            key_frames=grid.steps == 0,
            timestamps=times,
            lidar_to_ego=lidar_to_ego,
            ego_to_global=ego_to_global,
            pictures=[list(views) for views in zip(*pictures, strict=True)],
            intrinsics=np.broadcast_to(intrinsics, (len(times), *intrinsics.shape)).copy(),
            camera_to_lidar=global_to_lidar[:, None] @ np.stack(camera_to_global, axis=1),
            boxes=[found.in_lidar(matrix) for found, matrix in zip(objects, global_to_lidar, strict=True)],
        )

    def _key_sweeps(self, sweeps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Choose a sweep for every half second; times decide, since a lost sweep must not shift those after it."""
        keys = [sweeps[0]]
        while (wanted := keys[-1] + KEY_PERIOD) <= sweeps[-1] + KEY_WITHIN:
            nearest = sweeps[np.abs(sweeps - wanted).argmin()]
            if abs(nearest - wanted) > KEY_WITHIN:
                raise MagicDriveError(
                    f"{self.folder}/annotations.feather has no sweep near {wanted}: the nearest is"
                    f" {abs(nearest - wanted) / 1e9:.2f} s away",
                    "sweeps are missing: complete the download, or leave the log out with --skip-bad",
                )
            keys.append(nearest)
        return np.array(keys, np.int64)

    def _ego_at(self, times: NDArray[np.int64]) -> Floats:
        """Interpolate ego to city (T, 4, 4) at times (T,) in microseconds, all within the logged poses."""
        ego = self._ego
        before, after = ego.times[0] - times.min(), times.max() - ego.times[-1]
        file = f"{self.folder}/city_SE3_egovehicle.feather"
        if max(before, after) > POSE_WITHIN:
            side = "begins" if before > after else "ends"
            raise MagicDriveError(
                f"{file} {side} {max(before, after) / 1e6:.2f} s from a sweep or picture", "complete the download"
            )
        check_offsets(ego.times[ego.nearest(times)], times, file, "complete the download")
        return ego.pose_at(times)

    def vector_map(self) -> VectorMap:
        """Read rings and lines from ``map/log_map_archive_*.json``.

        Returns:
            The map, in metres of the city frame, sorted by layer; layers that Argoverse 2 does not have are empty.

        Raises:
            MagicDriveError: the file is missing or lacks a field.
        """
        values = read_json(self._map_file)
        drivable, crossing, divider, lane = (
            MAP_LAYERS.index(layer) for layer in ("drivable_area", "ped_crossing", "road_divider", "lane_divider")
        )
        paths = [
            (drivable, False, self._points(area, "area_boundary")) for area in self._areas(values, "drivable_areas")
        ]
        for area in self._areas(values, "pedestrian_crossings"):
            paths.append(
                (crossing, False, np.concatenate([self._points(area, "edge1"), self._points(area, "edge2")[::-1]]))
            )
        for segment in self._areas(values, "lane_segments"):
            for side in ("left", "right"):
                mark = self._map_field(segment, f"{side}_lane_mark_type")
                if mark in ("NONE", "UNKNOWN"):
                    continue
                layer = divider if "YELLOW" in str(mark) else lane  # yellow paint divides opposite directions
                paths.append((layer, False, self._points(segment, f"{side}_lane_boundary")))
        return VectorMap.of(sorted(paths, key=lambda path: path[0]))

    def _areas(self, values: Any, name: str) -> list[Any]:
        found = self._map_field(values, name)
        if not isinstance(found, dict):
            raise MagicDriveError(f"{self._map_file}: {name} does not hold shapes by their ids")
        return list(found.values())

    def _points(self, shape: Any, name: str) -> Floats:
        """Read the vertices (n, 2) of a shape, in metres."""
        vertices = self._map_field(shape, name)
        points = (
            [(self._map_field(v, "x"), self._map_field(v, "y")) for v in vertices] if isinstance(vertices, list) else []
        )
        if len(points) < 2 or not all(is_number(value) for point in points for value in point):
            raise MagicDriveError(
                f"{self._map_file}: {name} of the shape {shape.get('id')} is not two or more points of finite numbers"
            )
        out = np.array(points, np.float64)
        check_positions(out, lambda row: f"{self._map_file}: point {row} of {name} of the shape {shape.get('id')}")
        return out

    def _map_field(self, values: Any, name: str) -> Any:
        if not isinstance(values, dict) or name not in values:
            raise MagicDriveError(f"{self._map_file} lacks {name!r}, which an Argoverse 2 map must hold")
        return values[name]

    @cached_property
    def picture_sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes of pictures, as ``intrinsics.feather`` states them.

        Returns:
            (width, height) in pixels by name of the camera.
        """
        table = self._intrinsics
        sizes = np.stack([table["width_px"], table["height_px"]])
        if not ((sizes >= 1) & (sizes <= 1e5)).all():
            raise MagicDriveError(f"{self.folder}/calibration/intrinsics.feather: a picture has an impossible size")
        return {
            name: (int(width), int(height))
            for name, width, height in zip(table["sensor_name"], table["width_px"], table["height_px"], strict=True)
        }

    def _objects(self, sweeps: NDArray[np.int64], times: NDArray[np.int64]) -> list[Objects]:
        """Interpolate the objects at some times, in the global frame.

        Args:
            sweeps: (R,) times of annotated sweeps in nanoseconds.
            times: (F,) microseconds.
        """
        keys = [self._objects_at(sweep) for sweep in sweeps]
        after = np.clip(np.searchsorted(sweeps // 1000, times, side="right"), 1, len(sweeps) - 1)
        out = []
        for time, end in zip(times, after, strict=True):
            start_time, end_time = sweeps[end - 1] // 1000, sweeps[end] // 1000
            fraction = (time - start_time) / (end_time - start_time)
            whole = {0.0: keys[end - 1], 1.0: keys[end]}.get(fraction)
            out.append(whole or next(interpolate(keys[end - 1], keys[end], np.array([fraction]))))
        return out

    def _objects_at(self, sweep: int) -> Objects:
        table = self._annotations
        rows = np.flatnonzero((table["timestamp_ns"] == sweep) & np.isin(table["category"], list(CATEGORY_CLASSES)))
        sizes = np.stack([table[name][rows] for name in ("width_m", "length_m", "height_m")], axis=1)
        check_sizes(sizes, lambda row: f"{self.folder}/annotations.feather: the size in row {rows[row]}")
        if len(np.unique(table["track_uuid"][rows])) < len(rows):
            raise MagicDriveError(f"{self.folder}/annotations.feather: an object is twice in the sweep {sweep}")
        ego_to_global = self._ego_at(np.array([sweep // 1000]))[0]
        object_to_ego = self._poses(table, rows, "annotations.feather")
        rotations = poses.multiply(poses.quaternion(ego_to_global[:3, :3]), object_to_ego[0])
        return Objects(
            ids=[str(token) for token in table["track_uuid"][rows]],
            names=[CATEGORY_CLASSES[category] for category in table["category"][rows]],
            centres=poses.transform(ego_to_global, object_to_ego[1]),
            rotations=rotations,
            sizes=sizes,
        )

    def _sensor_to_ego(self, sensor: str) -> Floats:
        table = self._read("calibration/egovehicle_SE3_sensor.feather", ("sensor_name", *_QUATERNION, *_TRANSLATION))
        row = self._row(table, sensor, "egovehicle_SE3_sensor.feather")
        rotations, translations = self._poses(table, row, "calibration/egovehicle_SE3_sensor.feather")
        return poses.pose(rotations[0], translations[0])

    def _matrix(self, camera: str) -> Floats:
        """Compute the intrinsics (3, 3) of the central 16:9 window of a camera, scaled to 1600x900 pixels."""
        table = self._intrinsics
        row = self._row(table, camera, "intrinsics.feather")[0]
        left, top, right, _ = full_window(*self.picture_sizes[camera])
        scale = PICTURE_WIDTH / (right - left)
        fx, fy, cx, cy = (table[name][row] for name in ("fx_px", "fy_px", "cx_px", "cy_px"))
        matrix = np.array([[scale * fx, 0, scale * (cx - left)], [0, scale * fy, scale * (cy - top)], [0, 0, 1]])
        check_intrinsics(matrix[None], lambda _: f"{self.folder}/calibration/intrinsics.feather: {camera}")
        return matrix

    def _pictures(self, camera: str) -> list[Path]:
        folder = self.folder / "sensors/cameras" / camera
        files = [file for file in folder.glob("*.jpg") if not file.name.startswith(".")]  # as ._1.jpg of a Mac
        if not files:
            raise MagicDriveError(f"{folder} holds no pictures", "complete the download")
        for file in files:
            if not (file.stem.isascii() and file.stem.isdigit() and is_time(int(file.stem[:30]) // 1000)):
                raise MagicDriveError(f"{file} is not named by a time in nanoseconds", "remove it")
        return sorted(files, key=lambda file: int(file.stem))

    @cached_property
    def _ego(self) -> SensorTrack:
        table = self._read("city_SE3_egovehicle.feather", ("timestamp_ns", *_QUATERNION, *_TRANSLATION))
        rows = np.argsort(table["timestamp_ns"], kind="stable")
        rotations, translations = self._poses(table, rows, "city_SE3_egovehicle.feather")
        times = table["timestamp_ns"][rows] // 1000
        check_times(times, lambda row: f"{self.folder}/city_SE3_egovehicle.feather: timestamp_ns in row {rows[row]}")
        empty = np.zeros((len(rows), 0))
        return SensorTrack("ego", times, [], rotations, translations, empty, empty, np.zeros(0, np.int64))

    @cached_property
    def _annotations(self) -> dict[str, NDArray[Any]]:
        wanted = (
            "timestamp_ns",
            "track_uuid",
            "category",
            "length_m",
            "width_m",
            "height_m",
            *_QUATERNION,
            *_TRANSLATION,
        )
        return self._read("annotations.feather", wanted)

    @cached_property
    def _intrinsics(self) -> dict[str, NDArray[Any]]:
        wanted = ("sensor_name", "fx_px", "fy_px", "cx_px", "cy_px", "height_px", "width_px")
        return self._read("calibration/intrinsics.feather", wanted)

    @cached_property
    def _map_file(self) -> Path:
        files = sorted((self.folder / "map").glob("log_map_archive_*.json"))
        if not files:
            raise MagicDriveError(f"{self.folder}/map holds no log_map_archive_*.json", "complete the download")
        return files[0]

    def _poses(self, table: dict[str, NDArray[Any]], rows: NDArray[np.int64], file: str) -> tuple[Floats, Floats]:
        """Read quaternions (n, 4) and translations (n, 3) of some rows, and check that they are poses."""
        rotations, translations = (
            np.stack([table[name][rows] for name in names], axis=1) for names in (_QUATERNION, _TRANSLATION)
        )
        check_quaternions(rotations, lambda row: f"{self.folder / file}: the rotation in row {rows[row]}")
        check_positions(translations, lambda row: f"{self.folder / file}: the translation in row {rows[row]}")
        return rotations, translations

    def _row(self, table: dict[str, NDArray[Any]], sensor: str, file: str) -> NDArray[np.int64]:
        rows = np.flatnonzero(table["sensor_name"] == sensor)
        if len(rows) != 1:
            raise MagicDriveError(f"{self.folder}/calibration/{file} has {len(rows)} rows for {sensor}, expected 1")
        return rows

    def _read(self, file: str, columns: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        path = self.folder / file
        try:
            table = feather.read_table(path, memory_map=False)
        except FileNotFoundError:
            raise MagicDriveError(f"{path} is missing", "complete the download") from None
        except (pa.ArrowException, OSError) as error:
            raise MagicDriveError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        absent = [name for name in columns if name not in table.column_names]
        if absent:
            raise MagicDriveError(f"{path} has no column {absent[0]}")
        return {name: self._column(path, name, table.column(name)) for name in columns}

    def _column(self, path: Path, name: str, column: pa.ChunkedArray) -> NDArray[Any]:
        """Convert a column: texts, integer times and sizes, or float64."""
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        is_whole, is_real = pa.types.is_integer(column.type), pa.types.is_floating(column.type)
        if name in _TEXTS:
            fits, wanted = is_text, "texts"
        elif name.endswith("_ns"):
            fits, wanted = is_whole, "integers"
        else:
            fits, wanted = is_whole or is_real, "numbers"
        if not fits or column.null_count:
            raise MagicDriveError(
                f"{path}: column {name} holds {column.type} with {column.null_count} nulls, not {wanted}"
            )
        values: NDArray[Any] = column.to_numpy()
        return values if name in _TEXTS else values.astype(np.int64 if name.endswith("_ns") else np.float64)
