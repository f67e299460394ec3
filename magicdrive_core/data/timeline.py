"""The frames of a scene: which record of each sensor belongs to which frame, and where the lidar is at that time.

Two rules (``published`` in params.yaml chooses):

- by time stamp, the right one. Each half second between two key frames is cut into six. A camera's picture is the one
  nearest to the moment at which the camera would fire, interpolated between its own two key pictures, so that
  dropped and jittered pictures shift nothing. The lidar's pose is interpolated at the frame's time.
- published: five frames between key frames, frame k with the k-th sensor record after the key frame's. The 20 Hz
  lidar's poses then lie at about k * 50 ms while pictures and boxes are at k * 83 ms (oddity 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses

if TYPE_CHECKING:
    from magicdrive_core.data.nuscenes import Record, Tables

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
