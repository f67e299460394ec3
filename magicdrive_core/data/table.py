"""A scene as rows of ``frames.parquet``, a row a frame.

``SCHEMA`` documents the columns. Matrices are flattened row by row; poses are ``a_to_b`` and 4x4; views come in the
order of ``cameras.VIEWS``.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.geometry.cameras import VIEWS

_V = len(VIEWS)
_WORD = pa.dictionary(pa.int32(), pa.string())
_POSE = pa.list_(pa.float64(), 16)
SCHEMA = pa.schema(
    [
        ("scene", _WORD),  # scene token
        ("name", _WORD),  # scene name
        ("split", _WORD),  # "train", "val" or "both"
        ("location", _WORD),  # of the map
        ("description", _WORD),
        ("token", pa.string()),  # of the sample; between key frames that of the key frame before and a digit
        ("key_frame", pa.bool_()),
        ("timestamp", pa.int64()),  # microseconds
        ("lidar_to_ego", _POSE),
        ("ego_to_global", _POSE),  # at the lidar's time
        ("pictures", pa.list_(pa.string(), _V)),  # paths below the data root
        ("intrinsics", pa.list_(pa.float64(), _V * 9)),  # V, 3, 3 pixels of the full picture
        ("camera_to_lidar", pa.list_(pa.float64(), _V * 16)),  # V, 4, 4
        ("box_ids", pa.list_(_WORD)),  # N instance tokens
        ("box_names", pa.list_(_WORD)),  # N of CLASSES
        ("boxes", pa.list_(pa.list_(pa.float64(), 7))),  # N of x, y, z (centre, lidar frame), w, l, h, yaw'
    ]
)


def to_table(scene: Scene) -> pa.Table:
    """A scene as rows of ``SCHEMA``."""
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
    """The scene whose rows these are; its arrays are views of the table's memory."""
    columns = {name: _one(table.column(name)) for name in SCHEMA.names}
    F = table.num_rows
    offsets = columns["boxes"].offsets.to_numpy()
    boxes = _array(columns["boxes"].flatten(), 7)
    ids, names = _words(columns["box_ids"].flatten()), _words(columns["box_names"].flatten())
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
    """A column in one piece, copied only where it has several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fixed(values: np.ndarray, width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), width)


def _array(column: pa.FixedSizeListArray, *shape: int) -> np.ndarray:
    """The values of a fixed-size list column, a read-only view of its memory."""
    values = column.flatten().to_numpy()
    return values.reshape(shape if len(shape) > 1 else (-1, *shape))


def _words(column: pa.DictionaryArray) -> list[str]:
    """The words of a dictionary column; equal words are one object."""
    words = column.dictionary.to_pylist()
    return [words[index] for index in column.indices.to_pylist()]
