"""12 Hz infos: nuScenes tables -> ``frames.parquet`` (a row a frame, a row group a scene) and ``infos.json``.

``SCHEMA`` documents the columns. Matrices are flattened row by row; poses are ``a_to_b`` and 4x4; views come in the
order of ``cameras.VIEWS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from magicdrive_core.config import Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.records import CLASSES, FrameBoxes, Scene
from magicdrive_core.data.scenes import choose_splits
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

    With ``data.skip_bad``, scenes with broken records or pictures are left out, said on stderr and listed in
    ``infos.json``.

    Raises:
        MagicDriveError: unusable tables or pictures, named.
        UsageError: impossible ``data.val_scenes``.
    """
    adapter = open_adapter(config)
    names = adapter.names()
    splits = choose_splits(names, config.data.val_scenes, config.data.version)
    summary = _Summary()
    faults: list[str] = []
    with atomic_folder(out) as folder:
        with pq.ParquetWriter(folder / FRAMES, SCHEMA.with_metadata(_metadata(config)), compression="zstd") as writer:
            for name in track(names, "12 Hz infos"):
                try:
                    scene = adapter.read(name, splits[name])
                    picture_bytes, broken = check_pictures(adapter.root, adapter.pictures(scene))
                    if broken and config.data.skip_bad:
                        raise MagicDriveError(_of(broken))
                except MagicDriveError as error:
                    if not config.data.skip_bad:
                        raise
                    summary.quarantined[name] = error.message
                    continue
                faults += broken
                if config.published and len(scene) <= 6:  # as the published data set does
                    summary.left_out.append(scene.name)
                    continue
                summary.add(scene, picture_bytes)
                writer.write_table(to_table(scene), row_group_size=len(scene))
        for name, fault in summary.quarantined.items():
            Console(stderr=True).print(f"{name} is left out: {fault}", highlight=False, soft_wrap=True)
        if faults:
            hint = f"complete the download, or draw them: {_DRAW.format(config.data.root, config.data.version)}"
            raise MagicDriveError(_of(faults), hint)
        if not summary.scenes:
            reason = "is whole" if summary.quarantined else "has more than six frames"
            raise MagicDriveError(f"{config.data.root}: no scene of {config.data.version} {reason}")
        write_json(folder / "infos.json", summary.as_json(config))


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


def check_pictures(root: Path, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, list[str]]:
    """Looks at every picture's length and header; its pixels are first seen when it is used.

    Args:
        root: that paths are relative to.
        sizes: the width and height that each picture must have, by path.

    Returns:
        bytes of all pictures together; one line for each picture that is missing, empty, no picture or of another size.
    """
    total, faults = 0, []
    for path in sorted(sizes):
        try:
            total += (root / path).stat().st_size
            with Image.open(root / path) as picture:
                if picture.size != sizes[path]:
                    theirs, wanted = ("x".join(map(str, size)) for size in (picture.size, sizes[path]))
                    faults.append(f"{root / path} is a picture of {theirs} pixels, not {wanted}")
        except (FileNotFoundError, NotADirectoryError):
            faults.append(f"{root / path} is missing or empty")
        except (OSError, SyntaxError, ValueError):
            empty = (root / path).stat().st_size == 0
            faults.append(f"{root / path} is {'missing or empty' if empty else 'no picture'}")
    return total, faults


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
        self.quarantined: dict[str, str] = {}  # why, by name
        self.pictures: set[str] = set()
        self.picture_bytes = 0
        self.counts: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()

    def add(self, scene: Scene, picture_bytes: int) -> None:
        self.scenes.setdefault(scene.split, []).append(scene.name)
        self.picture_bytes += picture_bytes
        self.pictures.update(path for frame in scene.pictures for path in frame)
        self.counts.update(scenes=1, frames=len(scene), key_frames=int(scene.key_frames.sum()))
        self.classes.update(name for frame in scene.boxes for name in frame.names)

    def as_json(self, config: Config) -> dict[str, Any]:
        return {
            "version": config.data.version,
            "rule": RULES[config.published],
            "unpaired": "leave_out" if config.published else config.data.unpaired,
            **self.counts,
            "pictures": len(self.pictures),
            "picture_bytes": self.picture_bytes,
            "boxes": {name: self.classes[name] for name in CLASSES},
            "splits": self.scenes,
            "left_out": self.left_out,
            "quarantined": self.quarantined,
        }


_DRAW = "`magicdrive synth --render-for {} --version {}`"
_REMAKE = "run `dvc repro infos` to make it again"


def _metadata(config: Config) -> dict[str, str]:
    """What the parquet file says about itself, in the words of infos.json."""
    unpaired = "leave_out" if config.published else config.data.unpaired
    return {
        "magicdrive.version": config.data.version,
        "magicdrive.rule": RULES[config.published],
        "magicdrive.unpaired": unpaired,
    }


def _of(faults: Sequence[str]) -> str:
    """The first fault, and how many there are."""
    return faults[0] + (f" ({len(faults)} pictures are unusable)" if len(faults) > 1 else "")


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
