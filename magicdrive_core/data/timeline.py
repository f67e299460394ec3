"""The frames of a scene: which record of each sensor belongs to which frame, and where the lidar is at that time.

Two rules (``published`` in params.yaml chooses):

- by time stamp, the right one. Each half second between two key frames is cut into six. A camera's picture is the one
  nearest to the moment at which the camera would fire, interpolated between its own two key pictures, so that
  dropped and jittered pictures shift nothing. The lidar's pose is interpolated at the frame's time.
- published: five frames between key frames, frame k with the k-th sensor record after the key frame's. The 20 Hz
  lidar's poses then lie at about k * 50 ms while pictures and boxes are at k * 83 ms (oddity 19).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import CLASSES, FrameBoxes
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import lidar_boxes
from magicdrive_core.geometry.poses import slerp

if TYPE_CHECKING:
    from magicdrive_core.data.nuscenes_tables import Record, Tables

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PARTS = 6  # of half a second between key frames: 12 Hz
SUFFIXES = digits + ascii_lowercase  # a frame between: the key frame's token and one of these


@dataclass(frozen=True)
class Track:
    """The records of one sensor in a scene, R of them in time order."""

    channel: str
    times: Ints  # R, microseconds
    files: list[str]  # R
    ego_rotations: Floats  # R, 4 quaternions (w, x, y, z), ego to global at the record's time
    ego_translations: Floats  # R, 3 metres
    sensor_to_ego: Floats  # R, 4, 4
    intrinsics: Floats  # R, 3, 3 pixels; zeros for the lidar
    key_indices: Ints  # K: the record of each key frame

    @property
    def ego_to_global(self) -> Floats:
        """R, 4, 4."""
        return poses.pose(self.ego_rotations, self.ego_translations)

    def pose_at(self, times: Ints) -> Floats:
        """Ego to global at any times (T): translation linear, rotation slerp between the records around: (T, 4, 4)."""
        after = np.clip(np.searchsorted(self.times, times, side="right"), 1, max(1, len(self.times) - 1))
        before = after - 1
        after = np.minimum(after, len(self.times) - 1)
        span = np.maximum(self.times[after] - self.times[before], 1)
        fraction = np.clip((times - self.times[before]) / span, 0.0, 1.0)
        rotations = poses.slerp(self.ego_rotations[before], self.ego_rotations[after], fraction)
        start, end = self.ego_translations[before], self.ego_translations[after]
        return poses.pose(rotations, start + fraction[:, None] * (end - start))

    def nearest(self, times: Floats) -> Ints:
        """The records nearest to times (T); the earlier of two that are equally near."""
        after = np.clip(np.searchsorted(self.times, times), 1, max(1, len(self.times) - 1))
        before = after - 1
        after = np.minimum(after, len(self.times) - 1)
        return np.where(times - self.times[before] <= self.times[after] - times, before, after)


@dataclass(frozen=True)
class Grid:
    """F frames as parts of the intervals between K key frames."""

    keys: Ints  # F: the key frame at or before the frame
    steps: Ints  # F: 0 at key frames
    fractions: Floats  # F, in [0, 1): share of the interval

    @classmethod
    def between(cls, key_times: Ints, *, published: bool) -> Grid:
        """The frames of a scene with key frames at ``key_times`` (K) microseconds; the last key frame is the last one.

        Raises:
            MagicDriveError: two key frames lie too far apart for one letter a frame.
        """
        gaps = np.diff(key_times)
        halves = np.ones(len(gaps), np.int64) if published else np.maximum(1, np.rint(gaps / 500_000).astype(np.int64))
        parts = PARTS * halves
        if np.any(parts > len(SUFFIXES)):
            raise MagicDriveError(
                f"two key frames lie {gaps.max() / 1e6:.1f} s apart, at most {len(SUFFIXES) / 12:.0f} s can be filled"
            )
        keys = np.append(np.repeat(np.arange(len(gaps)), parts), len(gaps))
        steps = np.concatenate([*(np.arange(count) for count in parts), [0]]).astype(np.int64)
        return cls(keys, steps, steps / np.append(parts, 1)[keys])

    def interpolate(self, key_values: Ints) -> Floats:
        """Values at the key frames (K) -> values at the frames (F)."""
        following = np.minimum(self.keys + 1, len(key_values) - 1)
        start = key_values[self.keys].astype(np.float64)
        return start + self.fractions * (key_values[following] - key_values[self.keys])

    def following(self, track: Track) -> Ints:
        """The ``steps``-th record of a sensor after that of the key frame; the last one where the log ends before."""
        return np.minimum(track.key_indices[self.keys] + self.steps, len(track.times) - 1)


def read_tracks(tables: Tables, scene: Record, samples: Sequence[Record], channels: Sequence[str]) -> dict[str, Track]:
    """The tracks of the named sensors in a scene.

    Raises:
        MagicDriveError: a key frame without a record of a sensor, two records at one time, a pose that is no number.
    """
    records = tables.sensor_records(scene)
    return {channel: _track(tables, channel, samples, records.get(channel, [])) for channel in channels}


def _track(tables: Tables, channel: str, samples: Sequence[Record], records: Sequence[Record]) -> Track:
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
    return Track(
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
    """(3, 3) of a ``calibrated_sensor`` record; zeros for a lidar."""
    rows = tables.field("calibrated_sensor", record, "camera_intrinsic") or [[0.0] * 3] * 3
    try:
        matrix = np.array(rows, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise MagicDriveError(
            f"{tables.path('calibrated_sensor')}: camera_intrinsic of record {record['token']} is no matrix of 3x3"
            " finite numbers"
        )
    return matrix


# The annotated objects of key frames, and of the frames between them.
#
# An object is interpolated between two key frames that both hold its instance: centre linear, orientation slerp, class
# and size of the earlier one. An object that only one of the two holds is left out of the frames between, because where
# it was is not known. With ``data.unpaired: carry_on`` it is shown in the nearer half of the interval, as ``carry_on``
# says.


@dataclass(frozen=True)
class Objects:
    """N objects at one time in the global frame."""

    ids: list[str]  # instance tokens
    names: list[str]  # of CLASSES
    centres: Floats  # N, 3 metres
    rotations: Floats  # N, 4 quaternions (w, x, y, z), object to global
    sizes: Floats  # N, 3 width, length, height in metres

    def pick(self, rows: list[int]) -> Objects:
        """Some of the objects."""
        return Objects(
            [self.ids[row] for row in rows],
            [self.names[row] for row in rows],
            self.centres[rows],
            self.rotations[rows],
            self.sizes[rows],
        )

    def join(self, other: Objects) -> Objects:
        """These objects and then others."""
        return Objects(
            self.ids + other.ids,
            self.names + other.names,
            np.concatenate([self.centres, other.centres]),
            np.concatenate([self.rotations, other.rotations]),
            np.concatenate([self.sizes, other.sizes]),
        )

    def in_lidar(self, global_to_lidar: Floats) -> FrameBoxes:
        """The same objects as boxes of a lidar frame."""
        return FrameBoxes(self.ids, self.names, lidar_boxes(self.centres, self.rotations, self.sizes, global_to_lidar))


def read_objects(tables: Tables, sample: Record) -> Objects:
    """The objects of the ten classes in a key frame, those without lidar points too.

    Raises:
        MagicDriveError: a value that is no number, or a size that is not positive.
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


def interpolate(start: Objects, end: Objects, fractions: Floats) -> Iterator[Objects]:
    """The objects at each of ``fractions`` of the way from one key frame to the next."""
    rows = {token: row for row, token in enumerate(end.ids)}
    shared = [row for row, token in enumerate(start.ids) if token in rows]
    first, last = start.pick(shared), end.pick([rows[start.ids[row]] for row in shared])
    for fraction in fractions:
        centres = first.centres + fraction * (last.centres - first.centres)
        rotations = slerp(first.rotations, last.rotations, np.full(len(shared), fraction))
        yield Objects(first.ids, first.names, centres, rotations, first.sizes)


def carry_on(here: Objects, gone: Objects, other_side: Objects | None, step: float) -> Objects:
    """The objects of one key frame that its neighbour in time lacks, a little beyond their annotated places.

    They keep the heading and the velocity that they have between this key frame and the one on its other side, and
    stand still where that one does not hold them either.

    Args:
        here: the key frame that holds them.
        gone: the key frame that lacks them.
        other_side: the key frame on the other side of ``here``; None at an end of the scene.
        step: how far beyond ``here``, as a multiple of the time between ``other_side`` and ``here``.
    """
    absent = set(gone.ids)
    lone = here.pick([row for row, token in enumerate(here.ids) if token not in absent])
    rows = {} if other_side is None else {token: row for row, token in enumerate(other_side.ids)}
    centres = lone.centres.copy()
    for row, token in enumerate(lone.ids):
        if other_side is not None and token in rows:
            centres[row] += step * (lone.centres[row] - other_side.centres[rows[token]])
    return replace(lone, centres=centres)
