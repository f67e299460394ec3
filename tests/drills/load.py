"""One measurement of load in a process of its own: ``python -m tests.drills.load KIND COUNT FOLDER``.

Prints JSON: seconds of the work, and the largest resident memory of the process in MB, before and with the work.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Tracking
from magicdrive_core.data.infos import InfosWriter, read_scenes
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.data.scene_store import write_scene
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.checked import note_checked, stamps
from magicdrive_core.inference.items import item_fingerprint, list_items, unfinished
from magicdrive_core.tracking.runs import Store
from magicdrive_core.video.item_record import RECORD
from tests.conftest import PROJECT

FRAMES = 200  # of a scene
BOXES = 30  # of a frame
DIGESTS = {"model": "a" * 64, "versions": "sampler 1", "infos": "b" * 32}
RUNS_AT_ONCE = 20


def scene(number: int, frames: int, boxes: int) -> Scene:
    """Return a scene of standing objects, as large as one of nuScenes."""
    rng = np.random.default_rng(number)
    ids, names = [f"{number:016x}{box:016x}" for box in range(boxes)], ["car"] * boxes
    return Scene(
        token=f"{number:032x}",
        name=f"scene-{number:04}",
        split="val",
        location="singapore-onenorth",
        description="Nothing",
        tokens=[f"{number:016x}{frame:016x}" for frame in range(frames)],
        key_frames=np.arange(frames) % 6 == 0,
        timestamps=np.arange(frames) * 83_333,
        lidar_to_ego=np.tile(np.eye(4), (frames, 1, 1)),
        ego_to_global=np.tile(np.eye(4), (frames, 1, 1)),
        pictures=[[f"sweeps/{view}/{number}-{frame}.jpg" for view in VIEWS] for frame in range(frames)],
        intrinsics=np.tile(np.diag([1266.0, 1266.0, 1.0]), (frames, 6, 1, 1)),
        camera_to_lidar=np.tile(np.eye(4), (frames, 6, 1, 1)),
        boxes=[FrameBoxes(ids, names, rng.uniform(1, 5, (boxes, 7))) for _ in range(frames)],
    )


def frames(count: int, folder: Path) -> Callable[[], object]:
    """Go through the infos of so many frames."""
    facts = {"version": "v1.0-load", "rule": "by hand", "unpaired": "leave_out"}
    (folder / "infos").mkdir()
    with InfosWriter(folder / "infos", facts) as writer:
        for number in range(count // FRAMES):
            write_scene(folder / "infos", made := scene(number, FRAMES, BOXES))
            writer.add(made)
    return lambda: sum(len(boxes.ids) for each in read_scenes(folder / "infos") for boxes in each.boxes)


def items(count: int, folder: Path) -> Callable[[], object]:
    """Look through so many finished items, as a flow does before it starts."""
    config = load_config(PROJECT / "profiles/nuscenes.yaml", [f"generate.generations={count // 50}"])
    scenes = [scene(number, 41, 0) for number in range(50)]
    planned = list_items(config, scenes)
    for item in planned:
        (folder / item.name).mkdir()
        for name in (*(f"{view}.mp4" for view in VIEWS), "sheet.png", RECORD):
            (folder / item.name / name).write_bytes(b"0")
        note_checked(folder / item.name, item_fingerprint(config, item, DIGESTS), stamps(folder / item.name))

    def look() -> None:
        assert unfinished(config, list_items(config, scenes), folder, DIGESTS) == []

    return look


def runs(count: int, folder: Path) -> Callable[[], object]:
    """Record some more runs in a database that holds so many."""
    store = Store(Tracking(), folder)

    def record(number: int) -> None:
        run = store.open(f"stage1-{number}", {"stage": "stage1"})
        store.params(run, {"training": {"steps": 8, "betas": [0.9, 0.999]}})
        store.close(run, "FINISHED", weights_sha256="ab")

    noted = folder / "recorded"  # a smaller size was measured in the same database
    for number in range(int(noted.read_text()) if noted.exists() else 0, count):
        record(number)
    noted.write_text(str(count + RUNS_AT_ONCE))
    return lambda: [record(count + number) for number in range(RUNS_AT_ONCE)]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    kind, size, where = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    work = {"frames": frames, "items": items, "runs": runs}[kind](size, where)
    before, began = peak(), time.monotonic()
    work()
    print(json.dumps({"seconds": time.monotonic() - began, "before": before, "peak": peak()}))
