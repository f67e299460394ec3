"""Halos of lamps: light that a lens spreads about bright points. Integer arithmetic only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.synthetic.footage import Footage, Shot, read_footage
from magicdrive_core.synthetic.ground import (
    SEEN,
    SHADOW,
    WET,
    Ground,
    Labels,
    MapShapes,
    paint,
    prepare,
    read_shapes,
    shade,
)
from magicdrive_core.synthetic.lens import SHIFT, Lens, Pixels
from magicdrive_core.synthetic.light import COARSE, Light, Picture, colourise, darken, light_of
from magicdrive_core.synthetic.scenery import Scenery, scenery_of
from magicdrive_core.synthetic.sky import paint_sky
from magicdrive_core.synthetic.solids import Colour, Faces, Things, faces_of, fill, mirrored, seen
from magicdrive_core.utils.files import sync_folder, write_unsynced
from magicdrive_core.utils.progress import progress_bar

REACH = 700.0  # pixels of a halo's radius at one metre
SMALLEST, LARGEST = 3, 14  # cells


def add_halos(picture: Picture, lamps: list[tuple[Pixels, Colour, float]], strength: int) -> None:
    """Adds halos about the shining faces.

    Args:
        picture: changed in place.
        lamps: outline, colour and metres away of what shines.
        strength: of a halo's middle, in percent of the lamp's colour.
    """
    rows, columns = PICTURE_HEIGHT // COARSE + 1, PICTURE_WIDTH // COARSE
    cells = np.zeros((rows, columns, 3), np.int32)
    for outline, colour, away in lamps:
        low, high = outline.min(axis=0), outline.max(axis=0)
        x, y = ((low + high) // 2) >> SHIFT
        if not (0 <= x < PICTURE_WIDTH and 0 <= y < PICTURE_HEIGHT) or max(high - low) >> SHIFT > 120:
            continue  # shop windows close by are bright but are no lamps
        if tuple(picture[y, x]) != colour:
            continue  # something stands before it
        radius = int(np.clip(REACH / away / COARSE, SMALLEST, LARGEST))
        _stamp(cells, int(x) // COARSE, int(y) // COARSE, _halo(radius), np.array(colour) * strength // 100)
    bright = np.flatnonzero(cells.any(axis=(1, 2)))
    if not bright.size:
        return
    first, last = max(bright[0] - 1, 0), bright[-1] + 2
    halos = np.minimum(cells[first:last], 255).astype(np.uint8)
    fine = cv2.resize(halos, None, fx=COARSE, fy=COARSE, interpolation=cv2.INTER_LINEAR_EXACT)
    part = picture[first * COARSE : last * COARSE]
    cv2.add(part, fine[: len(part)], dst=part)


def _stamp(cells: NDArray[np.int32], x: int, y: int, halo: NDArray[np.int32], colour: NDArray[np.int64]) -> None:
    radius = len(halo) // 2
    left, top = max(x - radius, 0), max(y - radius, 0)
    right, bottom = min(x + radius + 1, cells.shape[1]), min(y + radius + 1, cells.shape[0])
    part = halo[top - y + radius : bottom - y + radius, left - x + radius : right - x + radius]
    cells[top:bottom, left:right] += part[..., None] * colour.astype(np.int32) // 1024


@cache
def _halo(radius: int) -> NDArray[np.int32]:
    """A bright spot that fades out at ``radius`` cells: 0 to 1024."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    share = np.maximum(1024 - 1024 * (x * x + y * y) // (radius * radius), 0)
    return (share * share // 1024 * share // 1024).astype(np.int32)


# One picture: sky, ground, shadows, mirror images on wet roads, things, halos of lamps.

Array = NDArray[np.float64]

QUALITY = 88  # of JPEG
LIT = 70.0  # metres within which street lamps light the ground
MIRRORED = 45.0  # metres within which things are mirrored in the wet
MIRROR_SHARE = 0.42  # of a mirror image in the road's colour


@dataclass(frozen=True)
class Place:
    """A location, prepared for drawing."""

    ground: Ground
    scenery: Things  # standing on z = 0
    lamps: Array  # (M, 2) street lamps


def prepare_place(shapes: MapShapes, scenery: Scenery) -> Place:
    """Everything that a map alone decides."""
    boxes = scenery.boxes
    c, s, zero = np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))
    rotations = np.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], axis=1).reshape(-1, 3, 3)
    things = Things(scenery.names, boxes[:, :3], boxes[:, 3:6], rotations, np.ones(len(boxes)))
    lamps = boxes[[name == "street_lamp" for name in scenery.names], :2]
    return Place(prepare(shapes), things, lamps.reshape(-1, 2))


def draw(lens: Lens, light: Light, place: Place, movers: Things) -> Picture:
    """Draws what a camera sees: (900, 1600, 3) blue, green, red.

    Args:
        lens: the camera and the ground plane under the car.
        light: of the scene.
        place: map and scenery.
        movers: the annotated objects at the time of the picture.
    """
    labels = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH), np.uint8)
    paint_sky(labels, lens)
    paint(labels, place.ground, lens)
    things = seen(movers.joined(standing(place.scenery, lens)), lens, SEEN)
    shade(labels, _shadows(things, light), lens)
    picture = colourise(labels, lens, light)
    lamps = place.lamps[np.linalg.norm(place.lamps - lens.eye[:2], axis=1) < LIT]
    if light.dark:
        darken(picture, lens, lamps)
    faces = faces_of(things, lens, light, lamps)
    if light.wet:
        _mirror(picture, labels, faces, lens)
    shining = fill(picture, faces, lens)
    if light.shining:
        add_halos(picture, shining, 60 if light.dark else 22)
    return picture


def encode(picture: Picture) -> bytes:
    """The picture as JPEG."""
    done, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise MagicDriveError("a picture could not be encoded as JPEG")
    return jpeg.tobytes()


def standing(scenery: Things, lens: Lens) -> Things:
    """Scenery near the camera, standing on the ground plane."""
    near = np.flatnonzero(np.linalg.norm(scenery.centres[:, :2] - lens.eye[:2], axis=1) < SEEN)
    chosen = scenery.taken(near)
    floor = np.column_stack([chosen.centres[:, :2], np.ones(len(near))]) @ lens.lift[2]
    centres = np.column_stack([chosen.centres[:, :2], floor + chosen.sizes[:, 2] / 2])
    return Things(chosen.names, centres, chosen.sizes, chosen.rotations, chosen.tints)


def _shadows(things: Things, light: Light) -> Array:
    """Quadrilaterals (Q, 4, 2) on the ground: footprints; in the sun also tops, and what the sides sweep over."""
    foot = things.footprints
    if not light.sun:
        return foot
    top = foot + (things.sizes[:, 2, None] * light.shadow_step)[:, None]
    after, top_after = np.roll(foot, -1, axis=1), np.roll(top, -1, axis=1)
    sides = np.stack([foot, after, top_after, top], axis=2)  # (N, 4, 4, 2)
    return np.concatenate([foot[:, None], top[:, None], sides], axis=1).reshape(-1, 4, 2)


def _mirror(picture: Picture, labels: Labels, faces: Faces, lens: Lens) -> None:
    """Mirrors faces in the wet road, and only there."""
    first = int(np.clip(lens.horizon - 40, 0, PICTURE_HEIGHT - 1))  # the horizon may lean
    image = picture.copy()
    fill(image, mirrored(faces, lens, MIRRORED), lens)
    ground = picture[first:]
    mixed = cv2.addWeighted(image[first:], MIRROR_SHARE, ground, 1 - MIRROR_SHARE, 0)
    wet = np.isin(np.arange(256) & ~SHADOW, WET).astype(np.uint8)
    cv2.copyTo(mixed, cv2.LUT(labels[first:], wet), ground)


# Draws the pictures that nuScenes tables name and the disk lacks.

BATCH = 24  # pictures a task


def render_missing(root: Path, version: str, workers: int | None = None) -> int:
    """Draws every missing picture of a data root from its tables and its map expansion.

    Args:
        root: the data root; pictures are written below it.
        version: its table folder.
        workers: processes; the host's cores if None. They do not change a byte.

    Returns:
        How many pictures were drawn.

    Raises:
        MagicDriveError: tables or map are missing or damaged, the disk is full, a process was killed.
    """
    missing = [
        replace(scene, shots=[shot for shot in scene.shots if not (root / shot.filename).is_file()])
        for scene in read_footage(root, version)
    ]
    tasks = [replace(scene, shots=shots) for scene in missing for shots in _batches(scene.shots)]
    total = sum(len(task.shots) for task in tasks)
    folders = {(root / shot.filename).parent for task in tasks for shot in task.shots}
    for location in sorted({task.location for task in tasks}):
        read_shapes(root, location)  # a missing map is better reported here than by each process
    with progress_bar() as bar:
        progress = bar.add_task("drawing pictures", total=total)
        for drawn in _run(root, tasks, workers or len(os.sched_getaffinity(0))):
            bar.advance(progress, drawn)
    for folder in sorted(folders):
        sync_folder(folder)
    return total


def _batches(shots: list[Shot]) -> Iterator[list[Shot]]:
    for start in range(0, len(shots), BATCH):
        yield shots[start : start + BATCH]


def _run(root: Path, tasks: list[Footage], workers: int) -> Iterator[int]:
    """Draws the tasks and yields the number of pictures of each when it is done."""
    if min(workers, len(tasks)) <= 1:
        threads, ipp = cv2.getNumThreads(), cv2.ipp.useIPP()
        prepare_process()
        try:
            for task in tasks:
                yield _draw_task(root, task)
        finally:
            cv2.setNumThreads(threads)
            cv2.ipp.setUseIPP(ipp)
        return
    # Spawned, not forked: the caller may hold threads, and forked locks would hang.
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), prepare_process) as pool:
        futures = [pool.submit(_draw_task, root, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise MagicDriveError(
                "a process that draws pictures was killed", "free some memory and run again: finished pictures are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare_process() -> None:
    """Makes OpenCV single-threaded and keeps it from Intel's library, whose results depend on the processor."""
    cv2.setNumThreads(1)
    cv2.ipp.setUseIPP(False)


@cache
def _place(root: Path, location: str) -> Place:
    return prepare_place(read_shapes(root, location), scenery_of(root, location))


def _draw_task(root: Path, scene: Footage) -> int:
    place, light = _place(root, scene.location), light_of(scene.description)
    for shot in scene.shots:
        picture = draw(shot.lens, light, place, scene.things(shot.timestamp))
        write_unsynced(root / shot.filename, encode(picture))
    return len(scene.shots)
