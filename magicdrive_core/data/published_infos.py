"""Read and write the published info files (``*_with_bid.pkl`` and the track-2 evaluation file).

Their format is described in the golden notes, section 3: one record a frame, and scenes as lists of sample tokens
without names.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.limits import check_quaternions, is_time
from magicdrive_core.data.plain_pickle import read_plain_pickle
from magicdrive_core.data.records import CLASSES, FrameBoxes, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import atomic_file

Record = dict[str, Any]
Floats = NDArray[np.float64]

CAMERA_ORDER = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
PROTOCOL = 4
UNKNOWN = -1  # number of lidar and radar points in a box, which scenes do not hold


def read_published(path: Path | str, split: str, names: Mapping[str, tuple[str, str]] | None = None) -> list[Scene]:
    """Read the scenes of a published info file, in its order.

    Args:
        path: the pickle file.
        split: the split that all of its scenes belong to.
        names: (token, name) of the scene of each sample, by the sample's token. A scene that is missing there takes the
            token of its first frame as token and name.

    Returns:
        The scenes; empty lists of frames are left out.

    Raises:
        MagicDriveError: the file is not plain data, or a record or field is missing or impossible; the message names
            it.
    """
    values = read_plain_pickle(path)
    if not isinstance(values, dict) or not {"infos", "scene_tokens"} <= set(values):
        raise MagicDriveError(f"{path} is not a published info file: it lacks infos or scene_tokens")
    if not isinstance(values["infos"], list) or not all(isinstance(record, dict) for record in values["infos"]):
        raise MagicDriveError(f"{path}: infos is not a list of records")
    records: dict[str, Record] = {}
    for record in values["infos"]:
        token = record.get("token")
        if not isinstance(token, str) or not token:
            raise MagicDriveError(f"{path}: a frame has the token {token!r}, expected a text")
        if token in records:
            raise MagicDriveError(f"{path}: two frames have the token {token!r}")
        records[token] = record
    scenes = [_frames_of(Path(path), records, tokens) for tokens in _as_list(values["scene_tokens"])]
    scenes = [frames for frames in scenes if frames]
    return [_read_scene(Path(path), frames, split, names or {}) for frames in scenes]


def write_published(scenes: Sequence[Scene], path: Path | str, version: str) -> None:
    """Write scenes as a published info file, for programs that read that format.

    Values that scenes do not hold are marked as unknown: no sweeps, -1 lidar and radar points. A camera's ego pose is
    that of the lidar, and ``sensor2ego`` includes the ego motion between lidar and camera time: camera to global is
    exact, but its two parts differ from the tables. Velocities are differences between neighbouring frames.

    Args:
        scenes: the scenes to write.
        path: the pickle file, written completely or not at all.
        version: name of the table folder, stored in the metadata.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    infos = [record for scene in scenes for record in _records(scene)]
    tokens = [list(scene.tokens) for scene in scenes]
    with atomic_file(path) as partial, partial.open("wb") as file:
        values = {"infos": infos, "metadata": {"version": version}, "scene_tokens": tokens}
        pickle.dump(values, file, protocol=PROTOCOL)


def _as_list(value: Any) -> list[Any]:
    """Return a list, tuple or one-dimensional array as a list; anything else as a list of None."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return list(value.tolist())
    return list(value) if isinstance(value, list | tuple) else [None]


def _frames_of(path: Path, records: Mapping[str, Record], tokens: Any) -> list[Record]:
    """Look up the frames of a scene by their tokens."""
    out = []
    for token in _as_list(tokens):
        if not isinstance(token, str):
            raise MagicDriveError(f"{path}: scene_tokens is not a list of lists of tokens")
        if token not in records:
            raise MagicDriveError(f"{path}: scene_tokens names the frame {token!r}, which infos does not hold")
        out.append(records[token])
    return out


def _read_scene(path: Path, records: Sequence[Record], split: str, names: Mapping[str, tuple[str, str]]) -> Scene:
    frames = [_Frame(path, record) for record in records]
    tokens = [frame.text("token") for frame in frames]
    descriptions = [frame.text("description") for frame in frames]
    known = set(tokens)
    between = [token[:-1] in known for token in tokens]  # the last key frame's token and one character
    token, name = names.get(tokens[0]) or names.get(tokens[0][:-1]) or (tokens[0], tokens[0])
    return Scene(
        token=token,
        name=name,
        split=split,
        location=frames[0].text("location"),
        description=descriptions[0],
        tokens=tokens,
        key_frames=~np.array(between),
        timestamps=np.array([frame.time() for frame in frames], np.int64),
        lidar_to_ego=np.stack([frame.pose("lidar2ego") for frame in frames]),
        ego_to_global=np.stack([frame.pose("ego2global") for frame in frames]),
        pictures=[[frame.camera(view).picture() for view in VIEWS] for frame in frames],
        intrinsics=_by_view(frames, lambda camera: camera.numbers("camera_intrinsics", 3, 3)),
        camera_to_lidar=_by_view(frames, lambda camera: camera.pose("sensor2lidar")),
        boxes=[frame.boxes() for frame in frames],
    )


def _by_view(frames: Sequence[_Frame], read: Any) -> Floats:
    return np.stack([[read(frame.camera(view)) for view in VIEWS] for frame in frames])


class _Frame:
    """One frame's record, or one camera in it, whose fields are checked when they are read.

    Args:
        path: the info file, for messages.
        record: the record.
        where: name of the record in messages; by default the frame's token.
    """

    def __init__(self, path: Path, record: Record, where: str = "") -> None:
        self._path, self._record = path, record
        self._where = where or f"frame {record['token']}"

    def field(self, name: str) -> Any:
        """Return a field of the record.

        Args:
            name: name of the field.

        Returns:
            The value, as the file holds it.

        Raises:
            MagicDriveError: the record lacks the field.
        """
        if not isinstance(self._record, dict) or name not in self._record:
            raise MagicDriveError(f"{self._path}: {self._where} has no {name}")
        return self._record[name]

    def text(self, name: str) -> str:
        """Return a field that must be a text.

        Args:
            name: name of the field.

        Returns:
            The text.

        Raises:
            MagicDriveError: the field is missing or no text.
        """
        value = self.field(name)
        if not isinstance(value, str):
            raise MagicDriveError(f"{self._path}: {name} of {self._where} is {value!r}, expected a text")
        return str(value)

    def time(self) -> int:
        """Return the time stamp.

        Returns:
            Microseconds.

        Raises:
            MagicDriveError: the field is missing or no possible time.
        """
        value = self.field("timestamp")
        if not is_time(int(value) if isinstance(value, float | np.number) and value == value // 1 else value):
            raise MagicDriveError(
                f"{self._path}: timestamp of {self._where} is {value!r}, expected integer microseconds"
            )
        return int(value)

    def numbers(self, name: str, *shape: int) -> Floats:
        """Return a field of finite numbers.

        Args:
            name: name of the field.
            shape: the shape that it must have; a first dimension of -1 may have any length, also 0.

        Returns:
            An array of this shape.

        Raises:
            MagicDriveError: the field is missing, or of another shape, or not finite.
        """
        try:
            values = np.asarray(self.field(name), np.float64)
        except (TypeError, ValueError):
            values = np.full(1, np.nan)
        wanted = (len(values) if shape[0] < 0 and values.ndim else shape[0], *shape[1:])
        if values.size == 0 and shape[0] < 0:
            return np.zeros((0, *shape[1:]))
        if values.shape != wanted or not np.isfinite(values).all():
            raise MagicDriveError(f"{self._path}: {name} of {self._where} is not {shape} finite numbers")
        return values

    def pose(self, name: str) -> Floats:
        """Return the pose of the fields ``<name>_rotation`` and ``<name>_translation``.

        Args:
            name: the pose, such as "lidar2ego"; its rotation may be a quaternion (w, x, y, z) or a (3, 3) matrix.

        Returns:
            (4, 4), in metres.

        Raises:
            MagicDriveError: a field is missing, or of another shape, or not finite.
        """
        given = self.field(f"{name}_rotation")
        is_matrix = isinstance(given, list | tuple | np.ndarray) and len(np.shape(given)) == 2
        rotation = self.numbers(f"{name}_rotation", *((3, 3) if is_matrix else (4,)))
        if rotation.shape == (4,):
            check_quaternions(rotation[None], lambda _: f"{self._path}: {name}_rotation of {self._where}")
        return poses.pose(rotation, self.numbers(f"{name}_translation", 3))

    def camera(self, view: str) -> _Frame:
        """Return the record of one camera.

        Args:
            view: channel of the camera, one of ``cameras.VIEWS``.

        Returns:
            The record, which messages call by view and frame.

        Raises:
            MagicDriveError: the frame has no such camera.
        """
        cameras = _Frame(self._path, self.field("cams"), self._where)
        return _Frame(self._path, cameras.field(view), f"{view} of {self._where}")

    def picture(self) -> str:
        """Return the path of a camera's picture; what precedes samples/ or sweeps/ depends on the writer's machine.

        Returns:
            The path below the data root.

        Raises:
            MagicDriveError: the path is missing, or in neither samples/ nor sweeps/.
        """
        path = self.text("data_path")
        start = max(path.rfind("samples/"), path.rfind("sweeps/"))
        if start < 0:
            raise MagicDriveError(f"{self._path}: data_path of {self._where} is in neither samples/ nor sweeps/")
        return path[start:]

    def words(self, name: str) -> list[str]:
        """Return a field that holds texts.

        Args:
            name: name of the field.

        Returns:
            The texts.

        Raises:
            MagicDriveError: the field is missing, or holds anything else.
        """
        words = _as_list(self.field(name))
        if not all(isinstance(word, str) for word in words):
            raise MagicDriveError(f"{self._path}: {name} of {self._where} does not hold texts")
        return [str(word) for word in words]

    def boxes(self) -> FrameBoxes:
        """Return the boxes of the ten classes; others are left out.

        Returns:
            The boxes in the lidar frame, in the order of the file.

        Raises:
            MagicDriveError: a field is missing, fields differ in length, or a size is not positive.
        """
        boxes = self.numbers("gt_boxes", -1, 7)
        ids, names = (self.words(name) for name in ("gt_box_ids", "gt_names"))
        if not len(boxes) == len(ids) == len(names):
            raise MagicDriveError(f"{self._path}: gt_boxes, gt_box_ids and gt_names of {self._where} differ in length")
        rows = [row for row, name in enumerate(names) if name in CLASSES]
        if np.any(boxes[rows, 3:6] <= 0):
            raise MagicDriveError(f"{self._path}: gt_boxes of {self._where} has a size that is not positive")
        return FrameBoxes([ids[row] for row in rows], [names[row] for row in rows], boxes[rows])


def _records(scene: Scene) -> list[Record]:
    night = "night" in scene.description.lower()
    velocities = _velocities(scene)
    out = []
    for frame, (token, boxes) in enumerate(zip(scene.tokens, scene.boxes, strict=True)):
        count = len(boxes.ids)
        lidar, ego = scene.lidar_to_ego[frame], scene.ego_to_global[frame]
        out.append(
            {
                "lidar_path": "",
                "token": token,
                "sweeps": [],
                "cams": {view: _camera(scene, frame, VIEWS.index(view)) for view in CAMERA_ORDER},
                **_parts("lidar2ego", lidar),
                **_parts("ego2global", ego),
                "timestamp": int(scene.timestamps[frame]),
                "location": scene.location,
                "description": scene.description,
                "timeofday": "night" if night else "day",
                "is_key_frame": True,
                "ego_velocity": np.full(3, np.nan),
                "gt_boxes": boxes.boxes.copy(),
                "gt_box_ids": np.array(boxes.ids, dtype=str),
                "gt_names": np.array(boxes.names, dtype=str),
                "gt_velocity": velocities[frame],
                "num_lidar_pts": np.full(count, UNKNOWN),
                "num_radar_pts": np.full(count, UNKNOWN),
                "visibility": np.zeros(count, np.uint8),
                "valid_flag": np.ones(count, bool),
            }
        )
    return out


def _camera(scene: Scene, frame: int, view: int) -> Record:
    camera_to_lidar = scene.camera_to_lidar[frame, view]
    return {
        "data_path": scene.pictures[frame][view],
        "type": VIEWS[view],
        "sample_data_token": "",
        **_parts("sensor2ego", scene.lidar_to_ego[frame] @ camera_to_lidar),
        **_parts("ego2global", scene.ego_to_global[frame]),
        "timestamp": int(scene.timestamps[frame]),
        "sensor2lidar_rotation": camera_to_lidar[:3, :3].copy(),
        "sensor2lidar_translation": camera_to_lidar[:3, 3].copy(),
        "camera_intrinsics": scene.intrinsics[frame, view].copy(),
    }


def _parts(name: str, matrix: Floats) -> Record:
    """Split a pose into quaternion (w, x, y, z) and translation."""
    return {
        f"{name}_rotation": poses.quaternion(matrix[:3, :3]).tolist(),
        f"{name}_translation": matrix[:3, 3].tolist(),
    }


def _velocities(scene: Scene) -> list[Floats]:
    """Compute the velocities of objects from neighbouring frames.

    Returns:
        For each frame (N, 2) metres a second along the lidar's x and y; NaN for objects that neither neighbouring
        frame holds.
    """
    lidar_to_global = scene.ego_to_global @ scene.lidar_to_ego
    positions = [
        dict(zip(boxes.ids, poses.transform(matrix, boxes.boxes[:, :3]), strict=True))
        for boxes, matrix in zip(scene.boxes, lidar_to_global, strict=True)
    ]
    out = []
    for frame, boxes in enumerate(scene.boxes):
        before, after = max(0, frame - 1), min(len(scene) - 1, frame + 1)
        velocity = np.full((len(boxes.ids), 2), np.nan)
        for row, token in enumerate(boxes.ids):
            first = before if token in positions[before] else frame
            last = after if token in positions[after] else frame
            if last > first:
                seconds = (scene.timestamps[last] - scene.timestamps[first]) / 1e6
                moved = (positions[last][token] - positions[first][token]) / seconds
                velocity[row] = (lidar_to_global[frame, :3, :3].T @ moved)[:2]
        out.append(velocity)
    return out
