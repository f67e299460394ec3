"""The synth stage: write a generated data root with tables, maps, lidar files, pictures and a manifest."""

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
from magicdrive_core.synthetic.scenery import load_scenery
from magicdrive_core.synthetic.tables import Rows, fixed_rows, merge, scene_rows
from magicdrive_core.synthetic.traffic import ScenePlan, plan_scene
from magicdrive_core.utils.files import atomic_file, read_json, sha256_file, sync_folder, write_json, write_unsynced
from magicdrive_core.utils.progress import track

STAMP = "synth.json"
MANIFEST = "manifest.csv"


def synthesize(synth: Synth, root: Path, version: str, workers: int | None = None) -> None:
    """Write the generated data set; an interrupted run is completed, and a complete data set is left as it is.

    Args:
        synth: the settings of the data.
        root: the data root.
        version: name of the table folder.
        workers: number of processes, by default one per core; the bytes do not depend on it.

    Raises:
        MagicDriveError: the root holds other data, or the disk is full or not writable.
    """
    stamp = {"generator": CITY_VERSION, "version": version, **synth.model_dump(mode="json", exclude_defaults=True)}
    found = read_json(root / STAMP) if (root / STAMP).is_file() else None
    if found == {**stamp, "complete": True} and _is_complete(root):
        return
    if found is None and root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir()):
        raise MagicDriveError(f"{root} holds data that was not generated", "choose an empty folder for data.root")
    if found is not None and {**found, "complete": None} != {**stamp, "complete": None}:
        _clear(root, str(found.get("version")))
    write_json(root / STAMP, {**stamp, "complete": False})
    _write_tables_and_maps(synth, root, version, workers)
    render_missing(root, version, workers)
    _write_manifest(root)
    write_json(root / STAMP, {**stamp, "complete": True})


def _write_tables_and_maps(synth: Synth, root: Path, version: str, workers: int | None) -> None:
    """Write everything but the pictures: maps, lidar files and tables."""
    plans = [plan_scene(synth, index) for index in range(synth.scenes)]
    locations = sorted({plan.location for plan in plans})
    for location in locations:
        write_expansion(root, city(location))
        write_mask(root, city(location))
    parts = [fixed_rows(locations, plans), *_scenes(root, plans, workers or len(os.sched_getaffinity(0)))]
    for table, rows in merge(parts).items():
        write_json(root / version / f"{table}.json", rows)


def _scenes(root: Path, plans: list[ScenePlan], workers: int) -> list[Rows]:
    jobs = [root] * len(plans), plans
    if min(workers, len(plans)) <= 1:
        return [_write_scene(root, plan) for plan in track(plans, "writing scenes")]
    with ProcessPoolExecutor(min(workers, len(plans)), get_context("spawn"), prepare_process) as pool:
        return list(track(pool.map(_write_scene, *jobs), "writing scenes", total=len(plans)))


def _write_scene(root: Path, plan: ScenePlan) -> Rows:
    """Write the lidar files of a scene and return its records."""
    boxes = load_scenery(root, plan.location).boxes.copy()
    boxes[:, 2] += boxes[:, 5] / 2  # z from the bottom to the centre
    rows, files = scene_rows(plan, boxes)
    for name, data in files.items():
        write_unsynced(root / name, data)
    for folder in sorted({(root / name).parent for name in files}):
        sync_folder(folder)
    return rows


def _write_manifest(root: Path) -> None:
    """Write path, length and SHA-256 of every picture and lidar file, sorted by path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "bytes", "sha256"])
    files = [path for kind in ("samples", "sweeps") for path in (root / kind).glob("*/*")]
    for path in sorted(files):
        if path.name.startswith("."):
            path.unlink()  # partial file of a killed run
        else:
            writer.writerow([path.relative_to(root).as_posix(), path.stat().st_size, sha256_file(path)])
    with atomic_file(root / MANIFEST) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


def _is_complete(root: Path) -> bool:
    """Check that every file of the manifest is there with its length."""
    try:
        with (root / MANIFEST).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return bool(rows) and all((root / row["path"]).stat().st_size == int(row["bytes"]) for row in rows)
    except (FileNotFoundError, KeyError, ValueError):
        return False


def _clear(root: Path, version: str) -> None:
    """Remove a data set that was generated with other settings; it can be generated again."""
    for name in (version, "maps", "samples", "sweeps"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / MANIFEST).unlink(missing_ok=True)
