"""The limits of what enters through data: the one schema of numbers, times and scenes that all adapters use.

An adapter checks what it reads, so that a message names the file and the record. ``check_scene`` then checks every
scene of every adapter, also imported ones: what it accepts is finite, bounded, ordered and complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import CLASSES, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Where = Callable[[int], str]  # names a row of an array in a message, such as "ego_pose.json: translation of record X"

FARTHEST = 2.1e7  # metres: half the circumference of the Earth, so that also UTM coordinates are within it
LARGEST = 200.0  # metres: a side of a box; road trains have 55
LAST_TIME = 10**16  # microseconds since 1970: the year 2286
FOCAL_LENGTHS = (1.0, 1e6)  # pixels of the full picture
PIXELS = 1e5  # a principal point or skew is at most this
LENGTH_ERROR = 0.1  # of a quaternion, relative to 1: those of the data sets are exact to float32
ROTATION_ERROR = 1e-3  # of R R^T - 1: what float32 and rounded texts leave
OFFSET = 0.2e6  # microseconds from a frame to the record that it shows: three lost records of a 12 Hz camera are 0.17 s


def is_number(value: Any) -> bool:
    """Check whether a decoded value is a finite number that fits float64; booleans and texts are none.

    Args:
        value: any decoded JSON or YAML value.

    Returns:
        Whether it is one.
    """
    if type(value) is int:
        return abs(value) < 10**300
    return type(value) is float and math.isfinite(value)


def is_time(value: Any) -> bool:
    """Check whether a decoded value is a possible time.

    Args:
        value: any decoded value.

    Returns:
        Whether it is an integer number of microseconds from 1970 to ``LAST_TIME``.
    """
    return type(value) is int and 0 <= value < LAST_TIME


def check_positions(values: Floats, where: Where) -> None:
    """Check that positions are finite and on Earth.

    Args:
        values: (N, ...) metres.
        where: names row n in a message.

    Raises:
        MagicDriveError: a coordinate is not finite or beyond ``FARTHEST``.
    """
    _refuse(~(np.abs(values) <= FARTHEST), where, f"is not finite or farther than {FARTHEST / 1e3:,.0f} km")


def check_quaternions(values: Floats, where: Where) -> None:
    """Check that quaternions are finite and of length 1.

    Args:
        values: (N, 4).
        where: names row n in a message.

    Raises:
        MagicDriveError: a quaternion is zero, not finite, or its length is not 1 up to ``LENGTH_ERROR``.
    """
    _refuse(~values.any(axis=-1), where, "is zero, expected a quaternion")
    with np.errstate(over="ignore", invalid="ignore"):
        length = np.linalg.norm(values, axis=-1)
    _refuse(~(np.abs(length - 1) <= LENGTH_ERROR), where, "is not a quaternion of length 1")


def check_poses(values: Floats, where: Where) -> None:
    """Check that poses are rigid motions.

    Args:
        values: (N, 4, 4).
        where: names row n in a message.

    Raises:
        MagicDriveError: a translation is impossible, a rotation mirrors or stretches, or a last row is not 0, 0, 0, 1.
    """
    check_positions(values[:, :3, 3], where)
    rotation = values[:, :3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(rotation @ np.swapaxes(rotation, -1, -2) - np.eye(3)).max((-2, -1))
        right_handed = np.einsum("ni,ni->n", np.cross(rotation[:, 0], rotation[:, 1]), rotation[:, 2]) > 0
    rigid = (error <= ROTATION_ERROR) & right_handed & (values[:, 3] == [0, 0, 0, 1]).all(1)
    _refuse(~rigid, where, "is not a rotation and a translation")


def check_sizes(values: Floats, where: Where) -> None:
    """Check the sides of boxes.

    Args:
        values: (N, 3) metres.
        where: names row n in a message.

    Raises:
        MagicDriveError: a side is not positive, not finite or longer than ``LARGEST``.
    """
    _refuse(~(values > 0), where, "is not positive")
    _refuse(~(values <= LARGEST), where, f"is more than {LARGEST:.0f} m")


def check_intrinsics(values: Floats, where: Where) -> None:
    """Check the intrinsics of pinhole cameras.

    Args:
        values: (N, 3, 3) pixels of the full picture.
        where: names row n in a message.

    Raises:
        MagicDriveError: a matrix is not finite or not that of a pinhole camera.
    """
    low, high = FOCAL_LENGTHS
    focal = values[:, [0, 1], [0, 1]]
    shifts = values[:, [0, 0, 1], [1, 2, 2]]
    pinhole = ((focal >= low) & (focal <= high)).all(1) & (np.abs(shifts) <= PIXELS).all(1)
    pinhole &= (values[:, [1, 2, 2, 2], [0, 0, 1, 2]] == [0, 0, 0, 1]).all(1)
    _refuse(~pinhole, where, "is not a matrix ((fx, s, cx), (0, fy, cy), (0, 0, 1)) of a pinhole camera")


def check_times(values: NDArray[np.int64], where: Where) -> None:
    """Check that times are possible and rise.

    Args:
        values: (N,) microseconds.
        where: names row n in a message.

    Raises:
        MagicDriveError: a time is before 1970 or after ``LAST_TIME``, or not later than the previous one.
    """
    _refuse((values < 0) | (values >= LAST_TIME), where, "is not a time in microseconds")
    _refuse(np.append(False, np.diff(values) <= 0), where, "is not later than that of the previous one")


def check_offsets(found: NDArray[np.int64], wanted: NDArray[np.int64] | Floats, what: str, hint: str = "") -> None:
    """Check that the records which frames show were taken near the time of the frame.

    Args:
        found: (N,) microseconds: the times of the records.
        wanted: (N,) microseconds: the times at which they should have been taken.
        what: the sensor, with its scene or file, for the message.
        hint: what the user can do.

    Raises:
        MagicDriveError: one of them is more than ``OFFSET`` away.
    """
    off = np.abs(found - wanted)
    if np.any(off > OFFSET):
        row = int(np.argmax(off))
        raise MagicDriveError(
            f"{what} has no record near {int(wanted[row])}: the nearest is {off[row] / 1e6:.2f} s away, at most"
            f" {OFFSET / 1e6:.1f} s is allowed",
            hint,
        )


def check_scene(scene: Scene) -> None:
    """Check that a scene is what all later steps expect; every adapter's scenes pass through here.

    Args:
        scene: the scene, of any adapter.

    Raises:
        MagicDriveError: a field is missing, not finite, not bounded or not ordered; the message names the scene, the
            frame and the field.
    """
    F, V = len(scene.tokens), len(VIEWS)
    for field in ("token", "name", "split", "location", "description"):
        if not isinstance(getattr(scene, field), str):
            raise MagicDriveError(f"{scene.name}: {field} is {getattr(scene, field)!r}, expected a text")
    if not F or not scene.token or not scene.name:
        raise MagicDriveError(f"{scene.name or scene.token}: the scene has no frames, no token or no name")
    _check_texts(scene)
    lengths = {
        "key_frames": scene.key_frames.shape == (F,),
        "timestamps": scene.timestamps.shape == (F,),
        "lidar_to_ego": scene.lidar_to_ego.shape == (F, 4, 4),
        "ego_to_global": scene.ego_to_global.shape == (F, 4, 4),
        "intrinsics": scene.intrinsics.shape == (F, V, 3, 3),
        "camera_to_lidar": scene.camera_to_lidar.shape == (F, V, 4, 4),
        "pictures": len(scene.pictures) == F and all(len(views) == V for views in scene.pictures),
        "boxes": len(scene.boxes) == F,
    }
    for field, fits in lengths.items():
        if not fits:
            raise MagicDriveError(f"{scene.name}: {field} does not hold {F} frames of {V} views")
    check_times(scene.timestamps, _frame_names(scene, "timestamp"))
    check_poses(scene.lidar_to_ego, _frame_names(scene, "lidar_to_ego"))
    check_poses(scene.ego_to_global, _frame_names(scene, "ego_to_global"))
    for view, name in enumerate(VIEWS):
        check_poses(scene.camera_to_lidar[:, view], _frame_names(scene, f"camera_to_lidar of {name}"))
        check_intrinsics(scene.intrinsics[:, view], _frame_names(scene, f"intrinsics of {name}"))
    counts = [len(boxes.ids) for boxes in scene.boxes]
    frames = np.repeat(np.arange(F), counts)
    fits = all(len(b.names) == n and b.boxes.shape == (n, 7) for b, n in zip(scene.boxes, counts, strict=True))
    if not fits or not {name for boxes in scene.boxes for name in boxes.names} <= set(CLASSES):
        raise MagicDriveError(f"{scene.name}: the boxes are not of shape (N, 7) with N ids and N of the ten classes")
    for boxes, token in zip(scene.boxes, scene.tokens, strict=True):
        if len(set(boxes.ids)) < len(boxes.ids):
            raise MagicDriveError(f"{scene.name}: frame {token} shows an object twice")
    rows = np.concatenate([np.zeros((0, 7)), *(boxes.boxes for boxes in scene.boxes)])

    def box(row: int) -> str:
        return f"{scene.name}: a box of frame {scene.tokens[frames[row]]}"

    check_positions(rows[:, :3], box)
    check_sizes(rows[:, 3:6], box)
    _refuse(~(np.abs(rows[:, 6]) <= 4 * np.pi), box, "has a heading that is not finite or more than two turns")


def _check_texts(scene: Scene) -> None:
    """Check the tokens of frames and the paths of pictures."""
    if len(set(scene.tokens)) < len(scene.tokens):
        raise MagicDriveError(f"{scene.name}: two frames have the same token")
    _check_all_texts(scene.name, "token of a frame", scene.tokens)
    for views in scene.pictures:
        _check_all_texts(scene.name, "path of a picture", views)
        for path in views:
            check_path(path, scene.name)
    for boxes in scene.boxes:
        _check_all_texts(scene.name, "token of an object", boxes.ids)


def _check_all_texts(scene: str, what: str, values: Sequence[Any]) -> None:
    for value in values:
        if not isinstance(value, str) or not value:
            raise MagicDriveError(f"{scene}: the {what} is {value!r}, expected a text")


def check_path(path: str, where: str) -> None:
    """Check that a path of the data stays below the data root.

    Args:
        path: a path below the root, as the data names it.
        where: what names it, for the message.

    Raises:
        MagicDriveError: the path is empty, absolute, holds ".." or a character that no file name can hold.
    """
    parts = path.split("/")
    if not all(parts) or ".." in parts or "\0" in path or max(map(len, parts)) > 255:
        raise MagicDriveError(f"{where}: {path[:300]!r} is not a path below the data root")


def _frame_names(scene: Scene, field: str) -> Where:
    return lambda row: f"{scene.name}: {field} of frame {scene.tokens[row]}"


def _refuse(wrong: Flags, where: Where, fault: str) -> None:
    """Raise the fault of the first row that has one; ``wrong`` is (N, ...)."""
    if wrong.any():
        row = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))[0])
        raise MagicDriveError(f"{where(row)} {fault}")
