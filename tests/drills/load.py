"""One measurement of load in a process of its own: ``python -m tests.drills.load KIND COUNT FOLDER``.

Prints JSON: CPU seconds of the work, and the resident memory of the process in MB before it and at most.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Tracking
from magicdrive_core.data.infos import InfosWriter, read_scenes
from magicdrive_core.data.records import FrameBoxes, Scene
from magicdrive_core.data.scene_store import write_scene
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.checked import note_checked, stamps
from magicdrive_core.inference.items import Item, item_fingerprint, list_items, unfinished
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


def make_frames(count: int, folder: Path) -> None:
    """Write the infos of so many frames."""
    facts = {"version": "v1.0-load", "rule": "by hand", "unpaired": "leave_out"}
    (folder / "infos").mkdir()
    with InfosWriter(folder / "infos", facts) as writer:
        for number in range(count // FRAMES):
            write_scene(folder / "infos", made := scene(number, FRAMES, BOXES))
            writer.add(made)


def read_frames(count: int, folder: Path) -> None:
    """Go through them as the planning of clips does."""
    boxes = sum(len(boxes.ids) for each in read_scenes(folder / "infos") for boxes in each.boxes)
    assert boxes == count // FRAMES * FRAMES * BOXES


def planned(count: int) -> tuple[Config, list[Item]]:
    """Plan so many items."""
    config = load_config(PROJECT / "profiles/nuscenes.yaml", [f"generate.generations={count // 50}"])
    return config, list_items(config, [scene(number, 41, 0) for number in range(50)])


def make_items(count: int, folder: Path) -> None:
    """Write the files of so many finished items, and note that they were checked."""
    config, made = planned(count)
    for item in made:
        (folder / item.name).mkdir()
        for name in (*(f"{view}.mp4" for view in VIEWS), "sheet.png", RECORD):
            (folder / item.name / name).write_bytes(b"0")
        note_checked(folder / item.name, item_fingerprint(config, item, DIGESTS), stamps(folder / item.name))


def look_at_items(count: int, folder: Path) -> None:
    """Look through them as a flow does before it starts."""
    config, made = planned(count)
    assert unfinished(config, made, folder, DIGESTS) == []


def make_runs(count: int, folder: Path) -> None:
    """Fill the database up to so many runs; a smaller size may have been measured in it."""
    noted = folder / "recorded"
    record_runs(count - (int(noted.read_text()) if noted.exists() else 0), folder)
    noted.write_text(str(count + RUNS_AT_ONCE))


def record_runs(count: int, folder: Path) -> None:
    """Record some more runs."""
    store = Store(Tracking(), folder)
    for number in range(count):
        run = store.open(f"stage1-{number}", {"stage": "stage1"})
        store.params(run, {"training": {"steps": 8, "betas": [0.9, 0.999]}})
        store.close(run, "FINISHED", weights_sha256="ab")


KINDS = {
    "frames": (make_frames, read_frames),
    "items": (make_items, look_at_items),
    "runs": (make_runs, lambda _, folder: record_runs(RUNS_AT_ONCE, folder)),
}


def memory(name: str) -> float:
    """Return an entry of this process's memory in MB: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    make, work = KINDS[sys.argv[1]]
    size, where = int(sys.argv[2]), Path(sys.argv[3])
    if (child := os.fork()) == 0:  # so that what it needed does not count here
        make(size, where)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    before, began = memory("VmRSS"), time.process_time()
    work(size, where)
    print(json.dumps({"seconds": time.process_time() - began, "before": before, "peak": memory("VmHWM")}))
