"""The Argoverse 2 adapter: sensor logs in ``root/version/<log id>/``.

Sweeps are annotated at 10 Hz. Every fifth is a key frame; the half second between two key frames is cut into six, boxes
are interpolated between neighbouring sweeps, and a camera's picture is the one nearest in time. The ring has seven
cameras for six views: the rear left one is not used (``CAMERAS``). Pictures are not 16:9: views show their largest
central 16:9 window (``cameras.full_window``). Maps hold drivable areas, crossings and painted lane boundaries.
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
            MagicDriveError: the log has fewer than six annotated sweeps, or a file, column, sensor or picture is
                missing.
        """
        sweeps = np.unique(self._annotations["timestamp_ns"])
        if len(sweeps) <= KEY_EVERY:
            raise MagicDriveError(f"{self.folder}/annotations.feather has {len(sweeps)} sweeps, expected at least 6")
        key_times = sweeps[::KEY_EVERY] // 1000
        grid = Grid.between(key_times, published=False)
        times = np.rint(grid.interpolate(key_times)).astype(np.int64)
        ego_to_global = self._ego.pose_at(times)
        # A lidar frame with the axes of nuScenes (x right, y forward) at the position of the upper lidar.
        lidar_to_ego = poses.pose([np.sqrt(0.5), 0, 0, -np.sqrt(0.5)], self._sensor_to_ego(LIDAR)[:3, 3])
        lidar_to_ego = np.broadcast_to(lidar_to_ego, (len(times), 4, 4)).copy()
        global_to_lidar = poses.inverse(ego_to_global @ lidar_to_ego)
        pictures, camera_to_global = [], []
        for camera in CAMERAS:
            files = self._pictures(camera)
            taken = np.array([int(file.stem) // 1000 for file in files], np.int64)
            nearest = np.abs(taken[None] - times[:, None]).argmin(1)
            pictures.append([files[index].relative_to(root).as_posix() for index in nearest])
            camera_to_global.append(self._ego.pose_at(taken[nearest]) @ self._sensor_to_ego(camera))
        objects = self._objects(sweeps, times)
        name, intrinsics = self.folder.name, np.stack([self._matrix(camera) for camera in CAMERAS])
        keys = [str(sweep) for sweep in sweeps[::KEY_EVERY]]
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
        try:
            paths = [(drivable, False, _points(area["area_boundary"])) for area in values["drivable_areas"].values()]
            for area in values["pedestrian_crossings"].values():
                paths.append((crossing, False, np.concatenate([_points(area["edge1"]), _points(area["edge2"])[::-1]])))
            for segment in values["lane_segments"].values():
                for side in ("left", "right"):
                    mark = segment[f"{side}_lane_mark_type"]
                    if mark in ("NONE", "UNKNOWN"):
                        continue
                    layer = divider if "YELLOW" in mark else lane  # yellow paint divides opposite directions
                    paths.append((layer, False, _points(segment[f"{side}_lane_boundary"])))
        except KeyError as error:
            raise MagicDriveError(f"{self._map_file} lacks {error}, which an Argoverse 2 map must hold") from None
        return VectorMap.of(sorted(paths, key=lambda path: path[0]))

    @cached_property
    def picture_sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes of pictures, as ``intrinsics.feather`` states them.

        Returns:
            (width, height) in pixels by name of the camera.
        """
        table = self._intrinsics
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
        if len(rows) and not np.all(sizes > 0):
            row = rows[int(np.argmin((sizes > 0).all(1)))]
            raise MagicDriveError(f"{self.folder}/annotations.feather: the size in row {row} is not positive")
        ego_to_global = self._ego.pose_at(np.array([sweep // 1000]))[0]
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
        return np.array([[scale * fx, 0, scale * (cx - left)], [0, scale * fy, scale * (cy - top)], [0, 0, 1]])

    def _pictures(self, camera: str) -> list[Path]:
        files = sorted((self.folder / "sensors/cameras" / camera).glob("*.jpg"), key=lambda file: int(file.stem))
        if not files:
            raise MagicDriveError(f"{self.folder}/sensors/cameras/{camera} holds no pictures", "complete the download")
        return files

    @cached_property
    def _ego(self) -> SensorTrack:
        table = self._read("city_SE3_egovehicle.feather", ("timestamp_ns", *_QUATERNION, *_TRANSLATION))
        rows = np.argsort(table["timestamp_ns"], kind="stable")
        rotations, translations = self._poses(table, rows, "city_SE3_egovehicle.feather")
        times = table["timestamp_ns"][rows] // 1000
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
        wrong = ~(np.isfinite(rotations).all(1) & np.isfinite(translations).all(1) & rotations.any(1))
        if wrong.any():
            raise MagicDriveError(f"{self.folder / file}: row {rows[int(np.argmax(wrong))]} is not a pose")
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
        return {name: table.column(name).to_numpy() for name in columns}


def _points(vertices: list[dict[str, float]]) -> Floats:
    return np.array([[point["x"], point["y"]] for point in vertices], np.float64).reshape(-1, 2)
