"""nuScenes scenes at 12 Hz: the nuScenes adapter, and how tables become a ``Scene``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.data.timeline import SUFFIXES, Grid, Objects, SensorTrack, extrapolate, interpolate
from magicdrive_core.data.vector_maps import VectorMap, load_map
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.utils.files import sha256_folder

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Config
    from magicdrive_core.data.nuscenes_tables import Record, Tables

Floats = NDArray[np.float64]


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
        record, published = self._records[name], self._config.published
        extrapolate_unpaired = self._config.data.unpaired == "carry_on"
        return build_scene(self._tables, record, split, published=published, extrapolate_unpaired=extrapolate_unpaired)

    def pictures(self, scene: Scene) -> dict[str, tuple[int, int]]:
        """Return picture sizes as ``sample_data.json`` states them; 1600x900 where it does not.

        Args:
            scene: a scene that ``read`` returned.

        Returns:
            (width, height) in pixels by path below the root.
        """
        channels = self._tables.sensor_records(self._records[scene.name])
        sizes = {
            record["filename"]: (record.get("width") or PICTURE_WIDTH, record.get("height") or PICTURE_HEIGHT)
            for channel in VIEWS
            for record in channels[channel]
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

    @cached_property
    def _tables(self) -> Tables:
        from magicdrive_core.data.nuscenes_tables import load_tables  # the devkit takes seconds to import

        return load_tables(self.root, self._config.data.version)

    @cached_property
    def _records(self) -> dict[str, Record]:
        return {str(self._tables.field("scene", record, "name")): record for record in self._tables.scene}


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
    from magicdrive_core.data.nuscenes_tables import official_split  # the devkit takes seconds to import

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
    from magicdrive_core.data.nuscenes_tables import LIDAR  # the devkit takes seconds to import

    samples = tables.samples(scene)
    tracks = read_tracks(tables, scene, samples, [LIDAR, *VIEWS])
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
        rows = [camera.nearest(grid.interpolate(camera.times[camera.key_indices])) for camera in cameras]
    lidar_to_global = ego_to_global @ lidar_to_ego
    global_to_lidar = poses.inverse(lidar_to_global)
    camera_to_global = [
        camera.ego_to_global[row] @ camera.sensor_to_ego[row] for camera, row in zip(cameras, rows, strict=True)
    ]
    objects = _objects(tables, samples, grid, key_times, extrapolate_unpaired=extrapolate_unpaired and not published)
    return Scene(
        token=scene["token"],
        name=tables.field("scene", scene, "name"),
        split=split,
        location=tables.location(scene),
        description=tables.field("scene", scene, "description"),
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
    tables: Tables, samples: Sequence[Record], grid: Grid, key_times: np.ndarray, *, extrapolate_unpaired: bool
) -> list[Objects]:
    """Interpolate the annotated objects at every frame, in the global frame."""
    keys = [read_objects(tables, sample) for sample in samples]
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


def read_tracks(
    tables: Tables, scene: Record, samples: Sequence[Record], channels: Sequence[str]
) -> dict[str, SensorTrack]:
    """Read the tracks of some sensors in a scene.

    Args:
        tables: tables of the data root.
        scene: the scene's record.
        samples: its key frames in order of time.
        channels: names of the sensors, such as "LIDAR_TOP".

    Returns:
        The track of each sensor, by channel.

    Raises:
        MagicDriveError: a key frame has no record of a sensor, two records have one time stamp, or a pose is not
            finite numbers.
    """
    records = tables.sensor_records(scene)
    return {channel: _track(tables, channel, samples, records.get(channel, [])) for channel in channels}


def _track(tables: Tables, channel: str, samples: Sequence[Record], records: Sequence[Record]) -> SensorTrack:
    index = {record["token"]: row for row, record in enumerate(records)}
    for sample in samples:
        if sample["data"].get(channel) not in index:
            raise MagicDriveError(
                f"{tables.path('sample_data')}: sample {sample['token']} has no key-frame record of {channel}",
                "the tables are incomplete: unpack the nuScenes metadata archive again",
            )
    times = np.array([tables.time("sample_data", record) for record in records], np.int64)
    if np.any(np.diff(times) <= 0):
        row = int(np.argmin(np.diff(times)))
        raise MagicDriveError(
            f"{tables.path('sample_data')}: {channel} has two records with the timestamp {times[row]}, one is"
            f" {records[row + 1]['token']}"
        )
    ego = [tables.follow("sample_data", record, "ego_pose_token", "ego_pose") for record in records]
    sensor = [
        tables.follow("sample_data", record, "calibrated_sensor_token", "calibrated_sensor") for record in records
    ]
    return SensorTrack(
        channel=channel,
        times=times,
        files=[tables.field("sample_data", record, "filename") for record in records],
        ego_rotations=tables.vectors("ego_pose", ego, "rotation", 4),
        ego_translations=tables.vectors("ego_pose", ego, "translation", 3),
        sensor_to_ego=poses.pose(
            tables.vectors("calibrated_sensor", sensor, "rotation", 4),
            tables.vectors("calibrated_sensor", sensor, "translation", 3),
        ),
        intrinsics=np.array([_intrinsics(tables, record) for record in sensor]),
        key_indices=np.array([index[sample["data"][channel]] for sample in samples], np.int64),
    )


def _intrinsics(tables: Tables, record: Record) -> Floats:
    """Read the (3, 3) intrinsics of a ``calibrated_sensor`` record; zeros for a lidar."""
    rows = tables.field("calibrated_sensor", record, "camera_intrinsic") or [[0.0] * 3] * 3
    try:
        matrix = np.array(rows, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise MagicDriveError(
            f"{tables.path('calibrated_sensor')}: camera_intrinsic of record {record['token']} is not a 3x3 matrix of"
            " finite numbers"
        )
    return matrix


def read_objects(tables: Tables, sample: Record) -> Objects:
    """Read the annotated objects of the ten classes in a key frame, also those without lidar points.

    Args:
        tables: tables of the data root.
        sample: record of the key frame.

    Returns:
        The objects in the global frame.

    Raises:
        MagicDriveError: a value is not a finite number, or a size is not positive.
    """
    from magicdrive_core.data.nuscenes_tables import detection_class  # the devkit takes seconds to import

    records = [tables.get("sample_annotation", token) for token in sample["anns"]]
    named = [(record, detection_class(record["category_name"])) for record in records]
    kept = [(record, name) for record, name in named if name in CLASSES]
    records = [record for record, _ in kept]
    sizes = tables.vectors("sample_annotation", records, "size", 3)
    if np.any(sizes <= 0):
        token = records[int(np.argmax((sizes <= 0).any(axis=1)))]["token"]
        raise MagicDriveError(f"{tables.path('sample_annotation')}: size of record {token} is not positive")
    return Objects(
        ids=[record["instance_token"] for record in records],
        names=[str(name) for _, name in kept],
        centres=tables.vectors("sample_annotation", records, "translation", 3),
        rotations=tables.vectors("sample_annotation", records, "rotation", 4),
        sizes=sizes,
    )
