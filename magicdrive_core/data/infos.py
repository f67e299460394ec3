"""12 Hz infos: nuScenes tables -> ``frames.parquet`` (a row a frame, a row group a scene) and ``infos.json``.

``SCHEMA`` documents the columns. Matrices are flattened row by row; poses are ``a_to_b`` and 4x4; views come in the
order of ``cameras.VIEWS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from magicdrive_core.config import Config
from magicdrive_core.data.records import CLASSES, FrameBoxes, Scene
from magicdrive_core.data.scenes import build_scene, choose_splits
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_folder, write_json
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.progress import track

FRAMES = "frames.parquet"
RULES = {False: "by time stamp", True: "published"}

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


def build_infos(config: Config, out: Path | str) -> None:
    """Writes the infos of every scene of ``config.data`` to the folder ``out``, whole or not at all.

    Raises:
        MagicDriveError: unusable tables or missing pictures, named.
        UsageError: impossible ``data.val_scenes``.
    """
    from magicdrive_core.data.nuscenes import load_tables  # the devkit takes seconds to import

    tables = load_tables(config.data.root, config.data.version)
    records = sorted(tables.scene, key=lambda scene: scene["name"])
    splits = choose_splits([scene["name"] for scene in records], config.data.val_scenes, config.data.version)
    summary = _Summary()
    with atomic_folder(out) as folder:
        with pq.ParquetWriter(folder / FRAMES, SCHEMA, compression="zstd") as writer:
            for record in track(records, "12 Hz infos"):
                scene = build_scene(
                    tables,
                    record,
                    splits[record["name"]],
                    published=config.published,
                    carry_lone=config.data.unpaired == "carry_on",
                )
                if config.published and len(scene) <= 6:  # as the published data set does
                    summary.left_out.append(scene.name)
                    continue
                summary.add(scene)
                writer.write_table(to_table(scene), row_group_size=len(scene))
        if not summary.scenes:
            raise MagicDriveError(f"{config.data.root}: no scene of {config.data.version} has more than six frames")
        sizes = check_pictures(tables.root, config.data.version, summary.pictures)
        write_json(folder / "infos.json", summary.as_json(config, sizes))


def read_scenes(folder: Path | str) -> list[Scene]:
    """The scenes of an infos folder, in the order of their names.

    Raises:
        MagicDriveError: no infos there, or broken ones.
    """
    path = Path(folder) / FRAMES
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise MagicDriveError(f"{path} was written by another version of this program", _REMAKE)
            return [from_table(file.read_row_group(group)) for group in range(file.num_row_groups)]
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", _REMAKE) from None
    except (pa.ArrowException, OSError) as error:
        raise MagicDriveError(f"{path} cannot be read: {' '.join(str(error).split())}", _REMAKE) from None


def check_pictures(root: Path, version: str, paths: Iterable[str]) -> int:
    """Makes sure that every picture is there and not empty.

    Returns:
        bytes of all pictures together.

    Raises:
        MagicDriveError: the first missing one, and how many are missing in all.
    """
    total, missing, first = 0, 0, ""
    for path in sorted(paths):
        try:
            size = (root / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            size = 0
        total += size
        missing += not size
        first = first or ("" if size else path)
    if missing:
        count = f" ({missing} pictures are missing or empty)" if missing > 1 else ""
        hint = f"complete the download, or draw them: `magicdrive synth --render-for {root} --version {version}`"
        raise MagicDriveError(f"{root / first} is missing or empty{count}", hint)
    return total


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
    """The scene of one row group."""
    columns = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
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


class _Summary:
    """What ``infos.json`` tells about the scenes."""

    def __init__(self) -> None:
        self.scenes: dict[str, list[str]] = {}
        self.left_out: list[str] = []
        self.pictures: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()

    def add(self, scene: Scene) -> None:
        self.scenes.setdefault(scene.split, []).append(scene.name)
        self.pictures.update(path for frame in scene.pictures for path in frame)
        self.counts.update(scenes=1, frames=len(scene), key_frames=int(scene.key_frames.sum()))
        self.classes.update(name for frame in scene.boxes for name in frame.names)

    def as_json(self, config: Config, picture_bytes: int) -> dict[str, Any]:
        return {
            "version": config.data.version,
            "rule": RULES[config.published],
            **self.counts,
            "pictures": len(self.pictures),
            "picture_bytes": picture_bytes,
            "boxes": {name: self.classes[name] for name in CLASSES},
            "splits": self.scenes,
            "left_out": self.left_out,
        }


_REMAKE = "run `dvc repro infos` to make it again"


def _fixed(values: np.ndarray, width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), width)


def _array(column: pa.FixedSizeListArray, *shape: int) -> np.ndarray:
    """The values of a fixed-size list column; a copy, so that the file need not stay mapped."""
    values = column.flatten().to_numpy()
    return values.reshape(shape if len(shape) > 1 else (-1, *shape)).copy()


def _words(column: pa.DictionaryArray) -> list[str]:
    """The words of a dictionary column; equal words are one object."""
    words = column.dictionary.to_pylist()
    return [words[index] for index in column.indices.to_pylist()]
