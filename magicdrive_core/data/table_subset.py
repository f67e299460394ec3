"""nuScenes tables cut down to some key frames of each scene: whole in themselves, so that any program can read them.

Used where a benchmark looks at three key frames of a scene and a program would ask for all forty.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magicdrive_core.data.roots import find_tables
from magicdrive_core.errors import MagicDriveError

Record = dict[str, Any]
Tables = dict[str, list[Record]]

SPLIT = "generated"  # in splits.json: the devkit's way to name scenes of one's own
_NAMES = (
    *("attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample"),
    *("sample_annotation", "sample_data", "scene", "sensor", "visibility"),
)


def read_tables(root: Path, version: str) -> Tables:
    """The 13 tables as they stand in ``root/version``.

    Raises:
        MagicDriveError: one is missing or no JSON.
    """
    folder = find_tables(root, version)
    tables = {}
    for name in _NAMES:
        path = folder / f"{name}.json"
        try:
            tables[name] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MagicDriveError(f"{path} is missing", "unpack the nuScenes metadata archive again") from None
        except ValueError as error:
            raise MagicDriveError(f"{path} is not valid JSON: {error}", "unpack the metadata archive again") from None
    return tables


def cut_tables(tables: Tables, samples: Sequence[str]) -> Tables:
    """The tables of some key frames alone: every token that one names, another one has.

    What came before and after is forgotten: the first sample of a scene has no ``prev``, and an object that is seen at
    one of the samples only has no velocity.

    Args:
        tables: of a whole data set; not changed.
        samples: tokens of the key frames to keep.

    Raises:
        MagicDriveError: a sample is not in the tables.
    """
    wanted = set(samples)
    kept = [record for record in tables["sample"] if record["token"] in wanted]
    missing = wanted - {record["token"] for record in kept}
    if missing:
        raise MagicDriveError(f"sample.json has no record {min(missing)!r}", "the videos belong to other tables")
    by_scene: dict[str, list[Record]] = defaultdict(list)
    for record in kept:
        by_scene[record["scene_token"]].append(record)
    for records in by_scene.values():
        records.sort(key=lambda record: record["timestamp"])
    sensors = {record["token"]: record["sensor_token"] for record in tables["calibrated_sensor"]}
    data = [r for r in tables["sample_data"] if r["is_key_frame"] and r["sample_token"] in wanted]
    data.sort(key=lambda record: record["timestamp"])
    scene_of = {record["token"]: record["scene_token"] for record in kept}
    tracks: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in data:
        tracks[scene_of[record["sample_token"]], sensors[record["calibrated_sensor_token"]]].append(record)
    notes = [record for record in tables["sample_annotation"] if record["sample_token"] in wanted]
    time_of = {record["token"]: record["timestamp"] for record in kept}
    notes.sort(key=lambda record: time_of[record["sample_token"]])
    objects: dict[str, list[Record]] = defaultdict(list)
    for record in notes:
        objects[record["instance_token"]].append(record)
    poses = {record["ego_pose_token"] for record in data}
    return tables | {
        "scene": [
            _shorter(record, by_scene[record["token"]]) for record in tables["scene"] if record["token"] in by_scene
        ],
        "sample": [record for records in by_scene.values() for record in _linked(records)],
        "sample_data": [record for records in tracks.values() for record in _linked(records)],
        "sample_annotation": [record for records in objects.values() for record in _linked(records)],
        "instance": [_seen(r, objects[r["token"]]) for r in tables["instance"] if r["token"] in objects],
        "ego_pose": [record for record in tables["ego_pose"] if record["token"] in poses],
    }


def write_cut(tables: Tables, root: Path, version: str, out: Path) -> None:
    """Writes cut tables as the data root ``out``, with map pictures, map expansion and ``splits.json`` (``SPLIT``).

    Args:
        tables: as ``cut_tables`` gives them.
        root: the data root that they were cut from; its maps are linked, not copied, where the disk allows.
        version: name of the table folder.
        out: the new root.
    """
    folder = out / version
    folder.mkdir(parents=True)
    for name, records in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    splits = {SPLIT: [record["name"] for record in tables["scene"]]}
    (folder / "splits.json").write_text(json.dumps(splits), encoding="utf-8")
    expansion = root / "maps/expansion"
    files = [*(root / record["filename"] for record in tables["map"]), *sorted(expansion.glob("*.json"))]
    for path in files:
        link_or_copy(path, out / path.relative_to(root))


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name: a hard link where both are on one disk, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)


def _linked(records: Sequence[Record]) -> list[Record]:
    """Records in order of time, each with the tokens of its neighbours."""
    tokens = ["", *(record["token"] for record in records), ""]
    return [record | {"prev": tokens[n], "next": tokens[n + 2]} for n, record in enumerate(records)]


def _shorter(scene: Record, samples: Sequence[Record]) -> Record:
    ends = {"first_sample_token": samples[0]["token"], "last_sample_token": samples[-1]["token"]}
    return scene | ends | {"nbr_samples": len(samples)}


def _seen(instance: Record, notes: Sequence[Record]) -> Record:
    ends = {"first_annotation_token": notes[0]["token"], "last_annotation_token": notes[-1]["token"]}
    return instance | ends | {"nbr_annotations": len(notes)}
