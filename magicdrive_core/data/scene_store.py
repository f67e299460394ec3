"""Scenes as Arrow tables: one row a frame, one memory-mapped file a scene.

``SCHEMA`` documents the columns, which ``frames.parquet`` shares. Matrices are flattened row by row; poses are 4x4
``a_to_b`` matrices; views are in the order of ``cameras.VIEWS``.

The kernel owns the pages of a mapped file: all ranks and workers of a host share them, and it can reclaim them. A
process owns only the scene that it is working on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from magicdrive_core.data.records import FrameBoxes, Scene, SceneHeader
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import atomic_file, file_name

SCENES = "scenes"  # folder of the scenes' files in an infos folder
_REMAKE = "run `dvc repro infos` to make it again"

_V = len(VIEWS)
_TEXT = pa.dictionary(pa.int32(), pa.string())
_POSE = pa.list_(pa.float64(), 16)
SCHEMA = pa.schema(
    [
        ("scene", _TEXT),  # scene token
        ("name", _TEXT),  # scene name
        ("split", _TEXT),  # "train", "val" or "both"
        ("location", _TEXT),  # of the map
        ("description", _TEXT),
        ("token", pa.string()),  # of the sample; between key frames, that of the last key frame and one character
        ("key_frame", pa.bool_()),
        ("timestamp", pa.int64()),  # microseconds
        ("lidar_to_ego", _POSE),
        ("ego_to_global", _POSE),  # at the lidar's time
        ("pictures", pa.list_(pa.string(), _V)),  # paths below the data root
        ("intrinsics", pa.list_(pa.float64(), _V * 9)),  # V, 3, 3 pixels of the full picture
        ("camera_to_lidar", pa.list_(pa.float64(), _V * 16)),  # V, 4, 4
        ("box_ids", pa.list_(_TEXT)),  # N instance tokens
        ("box_names", pa.list_(_TEXT)),  # N of CLASSES
        ("boxes", pa.list_(pa.list_(pa.float64(), 7))),  # N of x, y, z (centre, lidar frame), w, l, h, yaw'
    ]
)


def to_table(scene: Scene) -> pa.Table:
    """Convert a scene to rows of ``SCHEMA``.

    Args:
        scene: a scene of F frames.

    Returns:
        A table of F rows, in order of time; the scene's texts are repeated in each row.
    """
    F = len(scene)
    offsets = np.cumsum([0, *(len(frame.ids) for frame in scene.boxes)]).astype(np.int32)
    boxes = np.concatenate([frame.boxes for frame in scene.boxes])
    ids = [token for frame in scene.boxes for token in frame.ids]
    names = [name for frame in scene.boxes for name in frame.names]
    columns = {
        **{
            field: pa.array([value] * F).dictionary_encode()
            for field, value in (
                ("scene", scene.token),
                ("name", scene.name),
                ("split", scene.split),
                ("location", scene.location),
                ("description", scene.description),
            )
        },
        "token": pa.array(scene.tokens, pa.string()),
        "key_frame": pa.array(scene.key_frames),
        "timestamp": pa.array(scene.timestamps),
        "lidar_to_ego": _fixed(scene.lidar_to_ego, 16),
        "ego_to_global": _fixed(scene.ego_to_global, 16),
        "pictures": pa.array(scene.pictures, pa.list_(pa.string(), _V)),
        "intrinsics": _fixed(scene.intrinsics, _V * 9),
        "camera_to_lidar": _fixed(scene.camera_to_lidar, _V * 16),
        "box_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.string()).dictionary_encode()),
        "box_names": pa.ListArray.from_arrays(offsets, pa.array(names, pa.string()).dictionary_encode()),
        "boxes": pa.ListArray.from_arrays(offsets, _fixed(boxes, 7)),
    }
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> Scene:
    """Convert rows of ``SCHEMA`` to a scene.

    Args:
        table: all rows of one scene, in order of time.

    Returns:
        The scene. Its arrays are read-only views of the table's memory, except the flags of key frames, which Arrow
        packs into bits.
    """
    columns = {name: _one(table.column(name)) for name in SCHEMA.names}
    F = table.num_rows
    offsets = columns["boxes"].offsets.to_numpy()
    boxes = _array(columns["boxes"].flatten(), 7)
    ids, names = _texts(columns["box_ids"].flatten()), _texts(columns["box_names"].flatten())
    spans = [slice(*span) for span in pairwise(offsets - offsets[0])]
    return Scene(
        token=columns["scene"][0].as_py(),
        name=columns["name"][0].as_py(),
        split=columns["split"][0].as_py(),
        location=columns["location"][0].as_py(),
        description=columns["description"][0].as_py(),
        tokens=columns["token"].to_pylist(),
        key_frames=columns["key_frame"].to_numpy(zero_copy_only=False),
        timestamps=columns["timestamp"].to_numpy(),
        lidar_to_ego=_array(columns["lidar_to_ego"], F, 4, 4),
        ego_to_global=_array(columns["ego_to_global"], F, 4, 4),
        pictures=columns["pictures"].to_pylist(),
        intrinsics=_array(columns["intrinsics"], F, _V, 3, 3),
        camera_to_lidar=_array(columns["camera_to_lidar"], F, _V, 4, 4),
        boxes=[FrameBoxes(ids[span], names[span], boxes[span]) for span in spans],
    )


def _one(column: pa.ChunkedArray) -> pa.Array:
    """Return a column in one piece, copied only if it has several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fixed(values: np.ndarray, width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), width)


def _array(column: pa.FixedSizeListArray, *shape: int) -> np.ndarray:
    """Return the values of a fixed-size list column as a read-only view of its memory."""
    values = column.flatten().to_numpy()
    return values.reshape(shape if len(shape) > 1 else (-1, *shape))


def _texts(column: pa.DictionaryArray) -> list[str]:
    """Return the texts of a dictionary column; equal texts are one object."""
    texts = column.dictionary.to_pylist()
    return [texts[index] for index in column.indices.to_pylist()]


def scene_path(folder: Path, name: str) -> Path:
    """Return the file of a scene in an infos folder.

    Args:
        folder: the infos folder.
        name: name of the scene.

    Returns:
        ``<folder>/scenes/<name>.arrow``; a name that is no file name is changed, see ``files.file_name``.
    """
    return folder / SCENES / f"{file_name(name)}.arrow"


def write_scene(folder: Path, scene: Scene) -> None:
    """Write the file of a scene, completely or not at all.

    Args:
        folder: the infos folder.
        scene: the scene; its name is the name of the file.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    with atomic_file(scene_path(folder, scene.name)) as partial, pa.ipc.new_file(str(partial), SCHEMA) as file:
        file.write_table(to_table(scene).combine_chunks())


def read_scene(path: Path) -> Scene:
    """Read one scene.

    Args:
        path: the file, see ``scene_path``.

    Returns:
        The scene; its arrays are read-only views of the mapped file.

    Raises:
        MagicDriveError: the file is missing, broken, or was written by another version.
    """
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if not file.schema.equals(SCHEMA):
            raise MagicDriveError(f"{path} was written by another version of this program", _REMAKE)
        return from_table(file.read_all())
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", _REMAKE) from None
    except (pa.ArrowException, OSError) as error:
        raise MagicDriveError(f"{path} cannot be read: {' '.join(str(error).split())}", _REMAKE) from None


class Scenes(Sequence[Scene]):
    """The scenes of an infos folder in the order of their names; each access reads the scene again.

    Args:
        folder: the infos folder.

    Raises:
        MagicDriveError: the folder holds no scenes.
    """

    def __init__(self, folder: Path | str) -> None:
        self._paths = sorted((Path(folder) / SCENES).glob("[!.]*.arrow"))
        if not self._paths:
            raise MagicDriveError(f"{Path(folder) / SCENES} is missing: no scenes there", _REMAKE)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [read_scene(path) for path in self._paths[index]]
        return read_scene(self._paths[index])


class ScenesByToken(Mapping[str, Scene]):
    """Scenes by token, read at each access.

    Args:
        scenes: a lazy sequence such as ``Scenes``.
        headers: the header of each scene, in the same order.
    """

    def __init__(self, scenes: Sequence[Scene], headers: Sequence[SceneHeader]) -> None:
        self._scenes = scenes
        self._indices = {header.token: index for index, header in enumerate(headers)}

    def __getitem__(self, token: str) -> Scene:
        return self._scenes[self._indices[token]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
