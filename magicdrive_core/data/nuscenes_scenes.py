"""nuScenes scenes at 12 Hz: the nuScenes adapter, and how tables become a ``Scene``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config.schema import Config
from magicdrive_core.data.limits import check_intrinsics, check_offsets, check_path, is_number
from magicdrive_core.data.nuscenes_tables import (
    LIDAR,
    Record,
    SceneTables,
    Tables,
    detection_class,
    load_tables,
    official_split,
)
from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.data.timeline import SUFFIXES, Grid, Objects, SensorTrack, extrapolate, interpolate
from magicdrive_core.data.vector_maps import VectorMap, load_map
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.utils.files import sha256_folder

Floats = NDArray[np.float64]

_SILENT = "records of the sensor are missing: complete the tables, or leave the scene out with --skip-bad"


class NuScenesScenes:
    """The ``adapters.Adapter`` of nuScenes tables, of any root and version.

    Args:
        config: the whole configuration; its data section and ``published`` are used.
        project: the project's folder, which ``data.root`` is relative to.
    """

    def __init__(self, config: Config, project: Path) -> None:
        self.root = project / config.data.root
        self._config = config

    def names(self) -> list[str]:
        """List the names of all scenes.

        Returns:
            Names such as "scene-0061", sorted.

        Raises:
            MagicDriveError: the tables are missing, broken or inconsistent.
        """
        return sorted(self._records)

    def read(self, name: str, split: str) -> Scene:
        """Read one scene at 12 Hz.

        Args:
            name: name of the scene.
            split: "train", "val" or "both", stored in the scene.

        Returns:
            The scene, aligned as ``published`` says, with unpaired objects as ``data.unpaired`` says.

        Raises:
            MagicDriveError: records are incomplete or impossible; the message names them.
        """
        record, published = self._record(name), self._config.published
        extrapolate_unpaired = self._config.data.unpaired == "carry_on"
        return build_scene(self._tables, record, split, published=published, extrapolate_unpaired=extrapolate_unpaired)

    def pictures(self, scene: Scene) -> dict[str, tuple[int, int]]:
        """Return picture sizes as ``sample_data.json`` states them; 1600x900 where it does not.

        Args:
            scene: a scene that ``read`` returned.

        Returns:
            (width, height) in pixels by path below the root.
        """
        records = self._tables.of_scene(self._record(scene.name))
        sizes = {
            record["filename"]: (record.get("width") or PICTURE_WIDTH, record.get("height") or PICTURE_HEIGHT)
            for channel in VIEWS
            for record in records.sensor_records(channel)
        }
        return {path: sizes[path] for views in scene.pictures for path in views}

    def digest(self) -> str:
        """Digest the tables.

        Returns:
            64 hex digits.
        """
        return sha256_folder(self.root / self._config.data.version)

    def map_digest(self) -> str:
        """Digest the map expansion.

        Returns:
            64 hex digits.
        """
        return sha256_folder(self.root / "maps/expansion")

    def vector_map(self, scene: Scene) -> VectorMap:
        """Load the map expansion of the scene's location.

        Args:
            scene: the scene; only its location is used.

        Returns:
            The map, in metres of the global frame; scenes of one location share it.

        Raises:
            MagicDriveError: the map is missing or broken; the message names it.
        """
        return load_map(self.root, scene.location)

    def _record(self, name: str) -> Record:
        records = self._records[name]
        if len(records) > 1:
            tokens = ", ".join(record["token"] for record in records)
            raise MagicDriveError(
                f"{self._tables.path('scene')}: {len(records)} scenes have the name {name!r}: {tokens}",
                "give each scene its own name",
            )
        return records[0]

    @cached_property
    def _tables(self) -> Tables:
        return load_tables(self.root, self._config.data.version)

    @cached_property
    def _records(self) -> dict[str, list[Record]]:
        """The records of scenes by name; a scene without a name is found by its token, and refused when it is read."""
        out: dict[str, list[Record]] = defaultdict(list)
        for record in self._tables.scene:
            name = record.get("name")
            out[name if isinstance(name, str) and name else record["token"]].append(record)
        return out


def choose_splits(names: Sequence[str], val_scenes: Literal["auto"] | list[str], version: str) -> dict[str, str]:
    """Assign scenes to the splits "train" and "val"; a single scene is in "both".

    Args:
        names: names of all scenes.
        val_scenes: the validation scenes, or "auto": the official split if the devkit knows one for the version,
            otherwise the last quarter by name, at least one scene.
        version: name of the table folder.

    Returns:
        The split of each scene, by name.

    Raises:
        UsageError: ``val_scenes`` names unknown scenes, or leaves none to train on or to validate with.
    """
    if len(names) == 1:
        return dict.fromkeys(names, "both")
    if val_scenes == "auto":
        official = official_split(version)
        val = set(official[1]) & set(names) if official else set()
        val = val or set(sorted(names)[-max(1, len(names) // 4) :])
    else:
        val = set(val_scenes)
        unknown = sorted(val - set(names))
        if unknown:
            raise UsageError(f"data.val_scenes names {unknown[0]}, which is not a scene of {version}")
    if not val or len(val) == len(names):
        raise UsageError("data.val_scenes must leave at least one scene for training and one for validation")
    return {name: "val" if name in val else "train" for name in names}


def build_scene(
    tables: Tables, scene: Record, split: str, *, published: bool, extrapolate_unpaired: bool = False
) -> Scene:
    """Build one scene at 12 Hz by one of the two alignments of ``timeline``.

    Args:
        tables: tables of the data root.
        scene: the scene's record.
        split: the split that the scene belongs to.
        published: use the published alignment instead of time stamps.
        extrapolate_unpaired: show objects that only one of two key frames holds in the nearer half of the interval;
            ignored with ``published``.

    Returns:
        The scene, from its first to its last key frame.

    Raises:
        MagicDriveError: records are incomplete or impossible; the message names them.
    """
    records = tables.of_scene(scene)
    samples = records.samples()
    tracks = read_tracks(records, samples, [LIDAR, *VIEWS])
    lidar, cameras = tracks[LIDAR], [tracks[view] for view in VIEWS]
    key_times = lidar.times[lidar.key_indices]
    grid = Grid.between(key_times, published=published)
    times = np.rint(grid.interpolate(key_times)).astype(np.int64)
    if published:
        lidar_rows = grid.following(lidar)
        ego_to_global, lidar_to_ego = lidar.ego_to_global[lidar_rows], lidar.sensor_to_ego[lidar_rows]
        rows = [grid.following(camera) for camera in cameras]
    else:
        ego_to_global, lidar_to_ego = lidar.pose_at(times), lidar.sensor_to_ego[lidar.key_indices][grid.keys]
        wanted = [grid.interpolate(camera.times[camera.key_indices]) for camera in cameras]
        rows = [camera.nearest(moments) for camera, moments in zip(cameras, wanted, strict=True)]
        for camera, moments, row in zip(cameras, wanted, rows, strict=True):
            check_offsets(camera.times[row], moments, f"{records.path('sample_data')}: {camera.channel}", _SILENT)
        check_offsets(lidar.times[lidar.nearest(times)], times, f"{records.path('sample_data')}: {LIDAR}", _SILENT)
    lidar_to_global = ego_to_global @ lidar_to_ego
    global_to_lidar = poses.inverse(lidar_to_global)
    camera_to_global = [
        camera.ego_to_global[row] @ camera.sensor_to_ego[row] for camera, row in zip(cameras, rows, strict=True)
    ]
    objects = _objects(records, samples, grid, key_times, extrapolate_unpaired=extrapolate_unpaired and not published)
    return Scene(
        token=scene["token"],
        name=records.text("scene", scene, "name"),
        split=split,
        location=records.location(),
        description=records.text("scene", scene, "description"),
        tokens=[
            samples[key]["token"] + (SUFFIXES[step] if step else "")
            for key, step in zip(grid.keys, grid.steps, strict=True)
        ],
        key_frames=grid.steps == 0,
        timestamps=times,
        lidar_to_ego=lidar_to_ego,
        ego_to_global=ego_to_global,
        pictures=_pictures(cameras, rows),
        intrinsics=np.stack([camera.intrinsics[row] for camera, row in zip(cameras, rows, strict=True)], axis=1),
        camera_to_lidar=global_to_lidar[:, None] @ np.stack(camera_to_global, axis=1),
        boxes=[found.in_lidar(matrix) for found, matrix in zip(objects, global_to_lidar, strict=True)],
    )


def _pictures(cameras: Sequence[SensorTrack], rows: Sequence[np.ndarray]) -> list[list[str]]:
    by_view = [[camera.files[index] for index in row] for camera, row in zip(cameras, rows, strict=True)]
    return [list(views) for views in zip(*by_view, strict=True)]


def _objects(
    records: SceneTables, samples: Sequence[Record], grid: Grid, key_times: np.ndarray, *, extrapolate_unpaired: bool
) -> list[Objects]:
    """Interpolate the annotated objects at every frame, in the global frame."""
    keys = [read_objects(records, sample) for sample in samples]
    gaps = np.diff(key_times)
    out = []
    for index, (start, end) in enumerate(pairwise(keys)):
        fractions = grid.fractions[(grid.keys == index) & (grid.steps > 0)]
        out.append(start)
        for fraction, between in zip(fractions, interpolate(start, end, fractions), strict=True):
            lone = None
            if extrapolate_unpaired and fraction <= 0.5:
                step = fraction * gaps[index] / gaps[max(0, index - 1)]
                lone = extrapolate(start, end, keys[index - 1] if index else None, step)
            elif extrapolate_unpaired:
                later = min(index + 1, len(gaps) - 1)
                step = (1 - fraction) * gaps[index] / gaps[later]
                lone = extrapolate(end, start, keys[index + 2] if later > index else None, step)
            out.append(between.join(lone) if lone else between)
    return [*out, keys[-1]]


def read_tracks(records: SceneTables, samples: Sequence[Record], channels: Sequence[str]) -> dict[str, SensorTrack]:
    """Read the tracks of some sensors in a scene.

    Args:
        records: the records of the scene.
        samples: its key frames in order of time.
        channels: names of the sensors, such as "LIDAR_TOP".

    Returns:
        The track of each sensor, by channel.

    Raises:
        MagicDriveError: a key frame has no or several records of a sensor, two records have one time stamp, or a number
            or path is impossible.
    """
    return {channel: _track(records, channel, samples) for channel in channels}


def _track(records: SceneTables, channel: str, samples: Sequence[Record]) -> SensorTrack:
    rows = records.sensor_records(channel)
    keys: dict[str, list[int]] = defaultdict(list)  # rows of key-frame records, by sample
    for row, record in enumerate(rows):
        if record["is_key_frame"]:
            keys[record["sample_token"]].append(row)
    for sample in samples:
        if len(keys[sample["token"]]) != 1:
            count = "no" if not keys[sample["token"]] else f"{len(keys[sample['token']])} instead of one"
            raise MagicDriveError(
                f"{records.path('sample_data')}: sample {sample['token']} has {count} key-frame record of {channel}",
                "the tables are incomplete: unpack the nuScenes metadata archive again",
            )
    times = np.array([records.time("sample_data", record) for record in rows], np.int64)
    if np.any(np.diff(times) <= 0):
        row = int(np.argmin(np.diff(times)))
        raise MagicDriveError(
            f"{records.path('sample_data')}: {channel} has two records with the timestamp {times[row]}, one is"
            f" {rows[row + 1]['token']}"
        )
    key_indices = np.array([keys[sample["token"]][0] for sample in samples], np.int64)
    if np.any(np.diff(key_indices) <= 0):
        token = samples[int(np.argmin(np.diff(key_indices))) + 1]["token"]
        raise MagicDriveError(
            f"{records.path('sample_data')}: the key-frame record of {channel} of sample {token} is not later than that"
            " of the previous sample"
        )
    ego = [records.follow("sample_data", record, "ego_pose_token", "ego_pose") for record in rows]
    sensor = [records.follow("sample_data", record, "calibrated_sensor_token", "calibrated_sensor") for record in rows]
    files = [records.text("sample_data", record, "filename") for record in rows]
    for file in files:
        check_path(file, f"{records.path('sample_data')}: filename")
    return SensorTrack(
        channel=channel,
        times=times,
        files=files,
        ego_rotations=records.vectors("ego_pose", ego, "rotation", 4),
        ego_translations=records.vectors("ego_pose", ego, "translation", 3),
        sensor_to_ego=poses.pose(
            records.vectors("calibrated_sensor", sensor, "rotation", 4),
            records.vectors("calibrated_sensor", sensor, "translation", 3),
        ),
        intrinsics=_intrinsics(records, sensor) if channel in VIEWS else np.zeros((len(rows), 3, 3)),
        key_indices=key_indices,
    )


def _intrinsics(records: SceneTables, sensors: Sequence[Record]) -> Floats:
    """Read the intrinsics (R, 3, 3) of ``calibrated_sensor`` records of a camera."""

    def where(row: int) -> str:
        return f"{records.path('calibrated_sensor')}: camera_intrinsic of record {sensors[row]['token']}"

    for row, record in enumerate(sensors):
        value = records.field("calibrated_sensor", record, "camera_intrinsic")
        lines = value if isinstance(value, list) and len(value) == 3 else [None]
        if not all(isinstance(line, list) and len(line) == 3 and all(map(is_number, line)) for line in lines):
            raise MagicDriveError(f"{where(row)} is not a 3x3 matrix of finite numbers")
    matrices = np.array([record["camera_intrinsic"] for record in sensors], np.float64)
    check_intrinsics(matrices, where)
    return matrices


def read_objects(records: SceneTables, sample: Record) -> Objects:
    """Read the annotated objects of the ten classes in a key frame, also those without lidar points.

    Args:
        records: the records of the scene.
        sample: record of the key frame.

    Returns:
        The objects in the global frame.

    Raises:
        MagicDriveError: a value is not a finite number, or a size is not positive.
    """
    named = [(record, detection_class(category)) for record, category in records.objects(sample)]
    kept = [(record, name) for record, name in named if name in CLASSES]
    found = [record for record, _ in kept]
    return Objects(
        ids=[record["instance_token"] for record in found],
        names=[str(name) for _, name in kept],
        centres=records.vectors("sample_annotation", found, "translation", 3),
        rotations=records.vectors("sample_annotation", found, "rotation", 4),
        sizes=records.vectors("sample_annotation", found, "size", 3),
    )
