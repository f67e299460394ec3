"""Writes a whole generated data root: tables, maps, lidar files, pictures, manifest."""

from __future__ import annotations

import csv
import io
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from magicdrive_core.config.schema import Synth
from magicdrive_core.config.versions import CITY_VERSION
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.synthetic.city import city
from magicdrive_core.synthetic.map_expansion import write_expansion, write_mask
from magicdrive_core.synthetic.render import prepare_process, render_missing
from magicdrive_core.synthetic.scenery import scenery_of
from magicdrive_core.synthetic.tables import Rows, fixed_rows, merge, scene_rows
from magicdrive_core.synthetic.traffic import Plan, plan_scene
from magicdrive_core.utils.files import atomic_file, read_json, sha256_file, sync_folder, write_json, write_unsynced
from magicdrive_core.utils.progress import track

STAMP = "synth.json"
MANIFEST = "manifest.csv"


def synthesize(synth: Synth, root: Path, version: str, workers: int | None = None) -> None:
    """Writes the generated data set, or what an interrupted run left out; nothing if it is there already.

    Args:
        synth: what to generate.
        root: the data root.
        version: name of the table folder.
        workers: processes; the host's cores if None. They do not change a byte.

    Raises:
        MagicDriveError: the root holds other data, or the disk is full or not writable.
    """
    stamp = {"generator": CITY_VERSION, "version": version, **synth.model_dump(mode="json")}
    found = read_json(root / STAMP) if (root / STAMP).is_file() else None
    if found == {**stamp, "complete": True} and _is_complete(root):
        return
    if found is None and root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir()):
        raise MagicDriveError(f"{root} holds data that was not generated here", "choose an empty folder for data.root")
    if found is not None and {**found, "complete": None} != {**stamp, "complete": None}:
        _clear(root, str(found.get("version")))
    write_json(root / STAMP, {**stamp, "complete": False})
    _write_world(synth, root, version, workers)
    render_missing(root, version, workers)
    _write_manifest(root)
    write_json(root / STAMP, {**stamp, "complete": True})


def _write_world(synth: Synth, root: Path, version: str, workers: int | None) -> None:
    """Writes maps, lidar files and tables."""
    plans = [plan_scene(synth, index) for index in range(synth.scenes)]
    locations = sorted({plan.location for plan in plans})
    for location in locations:
        write_expansion(root, city(location))
        write_mask(root, city(location))
    parts = [fixed_rows(locations, plans), *_scenes(root, plans, workers or len(os.sched_getaffinity(0)))]
    for table, rows in merge(parts).items():
        write_json(root / version / f"{table}.json", rows)


def _scenes(root: Path, plans: list[Plan], workers: int) -> list[Rows]:
    jobs = [root] * len(plans), plans
    if min(workers, len(plans)) <= 1:
        return [_write_scene(root, plan) for plan in track(plans, "writing scenes")]
    with ProcessPoolExecutor(min(workers, len(plans)), get_context("spawn"), prepare_process) as pool:
        return list(track(pool.map(_write_scene, *jobs), "writing scenes", total=len(plans)))


def _write_scene(root: Path, plan: Plan) -> Rows:
    """Writes the lidar files of a scene and returns its records."""
    boxes = scenery_of(root, plan.location).boxes.copy()
    boxes[:, 2] += boxes[:, 5] / 2  # from the bottom to the centre
    rows, files = scene_rows(plan, boxes)
    for name, data in files.items():
        write_unsynced(root / name, data)
    for folder in sorted({(root / name).parent for name in files}):
        sync_folder(folder)
    return rows


def _write_manifest(root: Path) -> None:
    """Writes path, bytes and SHA-256 of every picture and lidar file, by path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "bytes", "sha256"])
    files = [path for kind in ("samples", "sweeps") for path in (root / kind).glob("*/*")]
    for path in sorted(files):
        if path.name.startswith("."):
            path.unlink()  # left by a killed run
        else:
            writer.writerow([path.relative_to(root).as_posix(), path.stat().st_size, sha256_file(path)])
    with atomic_file(root / MANIFEST) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


def _is_complete(root: Path) -> bool:
    """Whether every file of the manifest is there, as long as it should be."""
    try:
        with (root / MANIFEST).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return bool(rows) and all((root / row["path"]).stat().st_size == int(row["bytes"]) for row in rows)
    except (FileNotFoundError, KeyError, ValueError):
        return False


def _clear(root: Path, version: str) -> None:
    """Removes another generated data set, which can be made again."""
    for name in (version, "maps", "samples", "sweeps"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / MANIFEST).unlink(missing_ok=True)
