"""A nuScenes scene at 12 Hz, and the split that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from magicdrive_core.data.records import Scene
from magicdrive_core.data.timeline import (
    SUFFIXES,
    Grid,
    Objects,
    Track,
    carry_on,
    interpolate,
    read_objects,
    read_tracks,
)
from magicdrive_core.data.vector_maps import VectorMap, load_map
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.utils.files import sha256_folder

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Config
    from magicdrive_core.data.nuscenes_tables import Record, Tables


def build_scene(tables: Tables, scene: Record, split: str, *, published: bool, carry_lone: bool = False) -> Scene:
    """One scene at 12 Hz by one of the two rules of ``timeline``.

    Args:
        tables: of the data root.
        scene: its record.
        split: it belongs to.
        published: the published rule.
        carry_lone: objects that only one of two key frames holds are carried on towards the other (``objects``); never
            by the published rule.

    Raises:
        MagicDriveError: incomplete or impossible records, named.
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
    objects = _objects(tables, samples, grid, key_times, carry_lone=carry_lone and not published)
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


class NuScenesScenes:
    """nuScenes tables of any root and version, as ``adapters.Adapter``."""

    def __init__(self, config: Config, project: Path) -> None:
        self.root = project / config.data.root
        self._config = config

    def names(self) -> list[str]:
        """The scenes' names."""
        return sorted(self._records)

    def read(self, name: str, split: str) -> Scene:
        """One scene at 12 Hz."""
        record, published = self._records[name], self._config.published
        carry_lone = self._config.data.unpaired == "carry_on"
        return build_scene(self._tables, record, split, published=published, carry_lone=carry_lone)

    def pictures(self, scene: Scene) -> dict[str, tuple[int, int]]:
        """Sizes as ``sample_data.json`` states them."""
        channels = self._tables.sensor_records(self._records[scene.name])
        sizes = {
            record["filename"]: (record.get("width") or PICTURE_WIDTH, record.get("height") or PICTURE_HEIGHT)
            for channel in VIEWS
            for record in channels[channel]
        }
        return {path: sizes[path] for views in scene.pictures for path in views}

    def digest(self) -> str:
        """Of the tables."""
        return sha256_folder(self.root / self._config.data.version)

    def map_digest(self) -> str:
        """Of the map expansion."""
        return sha256_folder(self.root / "maps/expansion")

    def vector_map(self, scene: Scene) -> VectorMap:
        """The map expansion of the scene's location."""
        return load_map(self.root, scene.location)

    @cached_property
    def _tables(self) -> Tables:
        from magicdrive_core.data.nuscenes_tables import load_tables  # the devkit takes seconds to import

        return load_tables(self.root, self._config.data.version)

    @cached_property
    def _records(self) -> dict[str, Record]:
        return {str(self._tables.field("scene", record, "name")): record for record in self._tables.scene}


def choose_splits(names: Sequence[str], val_scenes: Literal["auto"] | list[str], version: str) -> dict[str, str]:
    """The split of each scene: "train", "val", or "both" where there is a single scene.

    Args:
        names: of all scenes.
        val_scenes: the validation scenes, or "auto": the official split where the devkit knows one for the version,
            else the last quarter by name, at least one.
        version: of the tables.

    Raises:
        UsageError: ``val_scenes`` names unknown scenes, or leaves none to train on.
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


def _pictures(cameras: Sequence[Track], rows: Sequence[np.ndarray]) -> list[list[str]]:
    by_view = [[camera.files[index] for index in row] for camera, row in zip(cameras, rows, strict=True)]
    return [list(views) for views in zip(*by_view, strict=True)]


def _objects(
    tables: Tables, samples: Sequence[Record], grid: Grid, key_times: np.ndarray, *, carry_lone: bool
) -> list[Objects]:
    """The objects of every frame, in the global frame."""
    keys = [read_objects(tables, sample) for sample in samples]
    gaps = np.diff(key_times)
    out = []
    for index, (start, end) in enumerate(pairwise(keys)):
        fractions = grid.fractions[(grid.keys == index) & (grid.steps > 0)]
        out.append(start)
        for fraction, between in zip(fractions, interpolate(start, end, fractions), strict=True):
            lone = None
            if carry_lone and fraction <= 0.5:
                step = fraction * gaps[index] / gaps[max(0, index - 1)]
                lone = carry_on(start, end, keys[index - 1] if index else None, step)
            elif carry_lone:
                later = min(index + 1, len(gaps) - 1)
                step = (1 - fraction) * gaps[index] / gaps[later]
                lone = carry_on(end, start, keys[index + 2] if later > index else None, step)
            out.append(between.join(lone) if lone else between)
    return [*out, keys[-1]]
