"""The 12 Hz timeline of a scene: frames between key frames, and what sensors and objects are at the time of a frame.

Two alignments (the setting ``published`` chooses):

- by time stamp, the correct one. Each half second between two key frames is cut into six. A camera's picture is the one
  nearest to the moment at which the camera would fire, interpolated between its own two key pictures, so that
  dropped and delayed pictures shift nothing. The lidar pose is interpolated at the time of the frame.
- published: five frames between key frames, frame k with the k-th sensor record after that of the key frame. The poses
  of the 20 Hz lidar are then those of about k * 50 ms, while pictures and boxes are those of k * 83 ms (oddity 19).

Annotated objects are interpolated between two key frames that both hold the instance: centre linear, orientation slerp,
class and size of the earlier one. An object that only one of the two holds is left out between them, because its
position is not known. With ``data.unpaired: carry_on`` it is extrapolated over the nearer half of the interval.

F frames, K key frames, R records of a sensor, N objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from string import ascii_lowercase, digits

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import FrameBoxes
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import lidar_boxes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PARTS = 6  # frames for each half second between key frames: 12 Hz
SUFFIXES = digits + ascii_lowercase  # the token of a frame between key frames: the last key frame's and one of these


@dataclass(frozen=True)
class SensorTrack:
    """The R records of one sensor in a scene, in order of time."""

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
        """Poses of the ego frame at the times of the records.

        Returns:
            (R, 4, 4), computed anew at each access.
        """
        return poses.pose(self.ego_rotations, self.ego_translations)

    def pose_at(self, times: Ints) -> Floats:
        """Interpolate the ego pose between neighbouring records: translation linear, rotation slerp.

        Args:
            times: (T,) microseconds; before the first and after the last record, that record's pose is used.

        Returns:
            (T, 4, 4) ego to global.
        """
        after = np.clip(np.searchsorted(self.times, times, side="right"), 1, max(1, len(self.times) - 1))
        before = after - 1
        after = np.minimum(after, len(self.times) - 1)
        span = np.maximum(self.times[after] - self.times[before], 1)
        fraction = np.clip((times - self.times[before]) / span, 0.0, 1.0)
        rotations = poses.slerp(self.ego_rotations[before], self.ego_rotations[after], fraction)
        start, end = self.ego_translations[before], self.ego_translations[after]
        return poses.pose(rotations, start + fraction[:, None] * (end - start))

    def nearest(self, times: Floats | Ints) -> Ints:
        """Find the record nearest to each time, the earlier of two that are equally near.

        Args:
            times: (T,) microseconds.

        Returns:
            (T,) indices of records.
        """
        after = np.clip(np.searchsorted(self.times, times), 1, max(1, len(self.times) - 1))
        before = after - 1
        after = np.minimum(after, len(self.times) - 1)
        return np.where(times - self.times[before] <= self.times[after] - times, before, after)


@dataclass(frozen=True)
class Grid:
    """The F frames of a scene, placed in the intervals between its K key frames."""

    keys: Ints  # F: index of the last key frame at or before the frame
    steps: Ints  # F: frames since that key frame, 0 at key frames
    fractions: Floats  # F, in [0, 1): position in the interval

    @classmethod
    def between(cls, key_times: Ints, *, published: bool) -> Grid:
        """Lay frames between key frames; the last key frame is the last frame.

        Args:
            key_times: (K,) microseconds.
            published: five frames between any two key frames; otherwise as many as fill the gap at 12 Hz.

        Returns:
            The grid of F frames: K key frames and those between them.

        Raises:
            MagicDriveError: two key frames are too far apart for one character of ``SUFFIXES`` a frame.
        """
        gaps = np.diff(key_times)
        halves = np.ones(len(gaps), np.int64) if published else np.maximum(1, np.rint(gaps / 500_000).astype(np.int64))
        parts = PARTS * halves
        if np.any(parts > len(SUFFIXES)):
            raise MagicDriveError(
                f"two key frames are {gaps.max() / 1e6:.1f} s apart, at most {len(SUFFIXES) / 12:.0f} s can be filled"
            )
        keys = np.append(np.repeat(np.arange(len(gaps)), parts), len(gaps))
        steps = np.concatenate([*(np.arange(count) for count in parts), [0]]).astype(np.int64)
        return cls(keys, steps, steps / np.append(parts, 1)[keys])

    def interpolate(self, key_values: Ints) -> Floats:
        """Interpolate values linearly from key frames to frames.

        Args:
            key_values: (K,) values at the key frames, for example times in microseconds.

        Returns:
            (F,) values in the same unit, not rounded.
        """
        following = np.minimum(self.keys + 1, len(key_values) - 1)
        start = key_values[self.keys].astype(np.float64)
        return start + self.fractions * (key_values[following] - key_values[self.keys])

    def following(self, track: SensorTrack) -> Ints:
        """Find each frame's record by the published alignment: the ``steps``-th after the key frame's.

        Args:
            track: the sensor.

        Returns:
            (F,) indices of records; the last record where the log ends early.
        """
        return np.minimum(track.key_indices[self.keys] + self.steps, len(track.times) - 1)


@dataclass(frozen=True)
class Objects:
    """The N annotated objects at one time, in the global frame."""

    ids: list[str]  # instance tokens
    names: list[str]  # of CLASSES
    centres: Floats  # N, 3 metres
    rotations: Floats  # N, 4 quaternions (w, x, y, z), object to global
    sizes: Floats  # N, 3 width, length, height in metres

    def pick(self, rows: list[int]) -> Objects:
        """Select objects by index.

        Args:
            rows: indices of objects, in the wanted order.

        Returns:
            The selected objects.
        """
        return Objects(
            [self.ids[row] for row in rows],
            [self.names[row] for row in rows],
            self.centres[rows],
            self.rotations[rows],
            self.sizes[rows],
        )

    def join(self, other: Objects) -> Objects:
        """Append other objects.

        Args:
            other: objects at the same time; instances that both hold would appear twice.

        Returns:
            These objects, then the others.
        """
        return Objects(
            self.ids + other.ids,
            self.names + other.names,
            np.concatenate([self.centres, other.centres]),
            np.concatenate([self.rotations, other.rotations]),
            np.concatenate([self.sizes, other.sizes]),
        )

    def in_lidar(self, global_to_lidar: Floats) -> FrameBoxes:
        """Convert the objects to boxes of the lidar frame.

        Args:
            global_to_lidar: (4, 4) pose.

        Returns:
            N boxes, see ``boxes.lidar_boxes``.
        """
        return FrameBoxes(self.ids, self.names, lidar_boxes(self.centres, self.rotations, self.sizes, global_to_lidar))


def interpolate(start: Objects, end: Objects, fractions: Floats) -> Iterator[Objects]:
    """Interpolate the objects that both of two neighbouring key frames hold.

    Args:
        start: objects of the earlier key frame.
        end: objects of the later key frame.
        fractions: times to interpolate at, 0 at ``start`` and 1 at ``end``.

    Yields:
        The objects at each fraction.
    """
    rows = {token: row for row, token in enumerate(end.ids)}
    shared = [row for row, token in enumerate(start.ids) if token in rows]
    first, last = start.pick(shared), end.pick([rows[start.ids[row]] for row in shared])
    for fraction in fractions:
        centres = first.centres + fraction * (last.centres - first.centres)
        rotations = poses.slerp(first.rotations, last.rotations, np.full(len(shared), fraction))
        yield Objects(first.ids, first.names, centres, rotations, first.sizes)


def extrapolate(here: Objects, gone: Objects, other_side: Objects | None, step: float) -> Objects:
    """Extrapolate the objects of a key frame that the neighbouring key frame lacks.

    Objects keep their heading, and their velocity between the key frame on the other side and this one; an object that
    the other side does not hold either stands still.

    Args:
        here: objects of the key frame that holds them.
        gone: objects of the neighbouring key frame, which lacks them.
        other_side: objects of the key frame on the other side of ``here``; None at an end of the scene.
        step: time from ``here`` to the wanted frame, as a multiple of the time between ``other_side`` and ``here``.

    Returns:
        The unpaired objects at the wanted time.
    """
    absent = set(gone.ids)
    lone = here.pick([row for row, token in enumerate(here.ids) if token not in absent])
    rows = {} if other_side is None else {token: row for row, token in enumerate(other_side.ids)}
    centres = lone.centres.copy()
    for row, token in enumerate(lone.ids):
        if other_side is not None and token in rows:
            centres[row] += step * (lone.centres[row] - other_side.centres[rows[token]])
    return replace(lone, centres=centres)
