"""The content of pictures as nuScenes tables describe it: posed cameras, and objects at any time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.limits import check_path
from magicdrive_core.data.nuscenes_files import REPAIR, read_tables
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.synthetic.camera import PosedCamera
from magicdrive_core.synthetic.solids import Solids

Array = NDArray[np.float64]

EXTRAPOLATED = 0.12e6  # microseconds that objects are shown before their first and after their last annotation
CATEGORY_CLASSES = {  # detection class of each nuScenes category, or of its leading parts
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
_NEEDED = (
    *("calibrated_sensor", "category", "ego_pose", "instance", "log"),
    *("sample", "sample_annotation", "sample_data", "scene"),
)
TINTS = (0.9, 1.0, 1.08)  # brightness factors that tell objects of one class apart


@dataclass(frozen=True)
class Shot:
    """A picture to draw.

    Poses are ``a_to_b`` matrices in metres, at the time of the picture; intrinsics are in pixels of the full picture.
    """

    filename: str  # below the data root
    timestamp: int  # microseconds
    intrinsics: Array  # (3, 3)
    camera_to_ego: Array  # (4, 4)
    ego_to_global: Array  # (4, 4)

    @property
    def camera(self) -> PosedCamera:
        """The camera at the time of the picture."""
        return PosedCamera(self.intrinsics, self.ego_to_global @ self.camera_to_ego, self.ego_to_global)


@dataclass(frozen=True)
class ObjectTrack:
    """One object over time: K annotations in order of time.

    Centres are metres and rotations quaternions, box to global, both in the global frame. ``tint`` is one of ``TINTS``.
    """

    token: str  # of the instance
    name: str  # of meshes.mesh_of
    tint: float
    size: Array  # (3,) w, l, h in metres
    times: NDArray[np.int64]  # (K,) microseconds
    centres: Array  # (K, 3)
    rotations: Array  # (K, 4) w, x, y, z

    def around(self, time: int) -> tuple[int, int, float] | None:
        """Find the annotations around a time.

        Args:
            time: microseconds.

        Returns:
            Indices of the annotations before and after, and the fraction of the interval between them; None if the
            object is absent.
        """
        if not self.times[0] - EXTRAPOLATED <= time <= self.times[-1] + EXTRAPOLATED:
            return None
        if len(self.times) == 1:
            return 0, 0, 0.0
        after = int(np.clip(np.searchsorted(self.times, time), 1, len(self.times) - 1))
        start, end = self.times[after - 1], self.times[after]
        return after - 1, after, float((time - start) / (end - start))


@dataclass(frozen=True)
class Footage:
    """The pictures and objects of one scene."""

    location: str
    description: str
    shots: list[Shot]
    tracks: list[ObjectTrack]

    def solids_at(self, time: int) -> Solids:
        """Interpolate all objects at a time: centres linear, rotations slerp.

        Args:
            time: microseconds. Objects are extrapolated by at most ``EXTRAPOLATED`` beyond their annotations, with the
                rotation of the nearest one.

        Returns:
            The objects that are present, in the order of ``tracks``.
        """
        present = [(index, around) for index, track in enumerate(self.tracks) if (around := track.around(time))]
        found = [(self.tracks[index], around) for index, around in present]
        share = np.array([share for _, (_, _, share) in found])
        (start, end), (turn_start, turn_end) = (
            [np.array([values(track)[around[side]] for track, around in found]).reshape(-1, width) for side in (0, 1)]
            for values, width in ((lambda track: track.centres, 3), (lambda track: track.rotations, 4))
        )
        return Solids(
            names=[track.name for track, _ in found],
            centres=start + share[:, None] * (end - start),
            sizes=np.array([track.size for track, _ in found]).reshape(-1, 3),
            rotations=poses.rotation_matrix(poses.slerp(turn_start, turn_end, np.clip(share, 0, 1))),
            tints=np.array([track.tint for track, _ in found]),
            ids=np.array([index for index, _ in present], dtype=np.int64),
        )


def read_footage(root: Path, version: str) -> list[Footage]:
    """Read the content of all pictures of a data root, scene by scene.

    Args:
        root: the data root.
        version: name of the table folder.

    Returns:
        The footage of each scene, in the order of ``scene.json``.

    Raises:
        MagicDriveError: a table is missing or damaged.
    """
    tables = {
        name: {record["token"]: record for record in records}
        for name, records in read_tables(root, version, _NEEDED).items()
    }
    try:
        footage = _footage(tables)
    except KeyError as error:
        raise MagicDriveError(f"the tables in {root / version} are inconsistent: {error} is missing", REPAIR) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise MagicDriveError(f"the tables in {root / version} hold an impossible value: {error}", REPAIR) from None
    for shot in (shot for scene in footage for shot in scene.shots):
        check_path(shot.filename, f"{root / version}/sample_data.json: filename")
    return footage


def _footage(tables: dict[str, dict[str, dict[str, Any]]]) -> list[Footage]:
    scene_of = {token: sample["scene_token"] for token, sample in tables["sample"].items()}
    shots: dict[str, list[Shot]] = defaultdict(list)
    for record in tables["sample_data"].values():
        sensor = tables["calibrated_sensor"][record["calibrated_sensor_token"]]
        if not sensor["camera_intrinsic"]:
            continue
        ego = tables["ego_pose"][record["ego_pose_token"]]
        shots[scene_of[record["sample_token"]]].append(
            Shot(
                filename=record["filename"],
                timestamp=record["timestamp"],
                intrinsics=np.array(sensor["camera_intrinsic"], dtype=np.float64),
                camera_to_ego=poses.pose(sensor["rotation"], sensor["translation"]),
                ego_to_global=poses.pose(ego["rotation"], ego["translation"]),
            )
        )
    annotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in tables["sample_annotation"].values():
        annotations[annotation["instance_token"]].append(annotation)
    tracks: dict[str, list[ObjectTrack]] = defaultdict(list)
    for instance, rows in annotations.items():
        category = tables["category"][tables["instance"][instance]["category_token"]]["name"]
        timed = sorted(((tables["sample"][row["sample_token"]]["timestamp"], row) for row in rows), key=lambda t: t[0])
        tracks[scene_of[rows[0]["sample_token"]]].append(
            ObjectTrack(
                token=instance,
                name=_mesh_name(category),
                tint=_tint(instance),
                size=np.array(timed[0][1]["size"], dtype=np.float64),
                times=np.array([time for time, _ in timed]),
                centres=np.array([row["translation"] for _, row in timed], dtype=np.float64),
                rotations=np.array([row["rotation"] for _, row in timed], dtype=np.float64),
            )
        )
    return [
        Footage(
            location=tables["log"][scene["log_token"]]["location"],
            description=scene["description"],
            shots=shots[token],
            tracks=tracks[token],
        )
        for token, scene in tables["scene"].items()
    ]


def edited_footage(footage: Footage, before: Scene, after: Scene) -> Footage:
    """Apply the edits of a scene to its footage, so that the edited scene can be rendered.

    Args:
        footage: the footage of the scene.
        before: the scene.
        after: the scene with new boxes or a new description; its ego poses are those of ``before``.

    Returns:
        The footage with the description of ``after``. Objects whose boxes are equal in both keep their tracks; others
        follow the boxes of ``after``, or are gone.
    """
    old, new = _tracks_of(before), _tracks_of(after)
    kept = [track for track in footage.tracks if _equal(old.get(track.token), new.get(track.token))]
    same = {track.token for track in kept}
    changed = [track for token, track in new.items() if token not in same]
    return replace(footage, description=after.description, tracks=kept + changed)


def _tracks_of(scene: Scene) -> dict[str, ObjectTrack]:
    """Collect the boxes of a scene as tracks, by instance token."""
    lidar_to_global = scene.ego_to_global @ scene.lidar_to_ego
    rows: dict[str, list[tuple[int, Array]]] = defaultdict(list)
    names: dict[str, str] = {}
    for frame, listed in enumerate(scene.boxes):
        for token, name, box in zip(listed.ids, listed.names, listed.boxes, strict=True):
            rows[token].append((frame, box))
            names[token] = name
    tracks = {}
    for token, timed in rows.items():
        frames, boxes = [frame for frame, _ in timed], np.array([box for _, box in timed])
        headings = -boxes[:, 6] - np.pi / 2
        zero = np.zeros_like(headings)
        turns = poses.rotation_matrix(np.stack([np.cos(headings / 2), zero, zero, np.sin(headings / 2)], axis=1))
        moved = lidar_to_global[frames] @ poses.pose(turns, boxes[:, :3])
        tracks[token] = ObjectTrack(
            token=token,
            name=names[token],
            tint=_tint(token),
            size=boxes[0, 3:6],
            times=scene.timestamps[frames],
            centres=moved[:, :3, 3],
            rotations=poses.quaternion(moved[:, :3, :3]),
        )
    return tracks


def _equal(one: ObjectTrack | None, other: ObjectTrack | None) -> bool:
    """Tell whether two tracks are the same; two missing ones are: the scene does not list the object."""
    if one is None or other is None:
        return one is other
    return (
        one.name == other.name
        and np.array_equal(one.times, other.times)
        and np.allclose(one.centres, other.centres, atol=1e-6)
        and np.allclose(one.size, other.size, atol=1e-6)
        and np.allclose(one.rotations, other.rotations, atol=1e-6)
    )


def _tint(instance: str) -> float:
    """Choose the brightness factor of an object by its instance token."""
    return TINTS[hashlib.md5(instance.encode(), usedforsecurity=False).digest()[0] % len(TINTS)]


def _mesh_name(category: str) -> str:
    parts = category.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((CATEGORY_CLASSES[prefix] for prefix in prefixes if prefix in CATEGORY_CLASSES), category)
