"""Render camera pictures: sky, ground, shadows, mirror images on wet roads, solids and halos of lamps, in this order.

``draw`` renders one picture; ``render_missing`` renders all pictures that nuScenes tables name and the disk lacks, in
several processes.
"""

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
from einops import rearrange
from numpy.typing import NDArray

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.synthetic.camera import SHIFT, Pixels, PosedCamera
from magicdrive_core.synthetic.footage import Footage, Shot, read_footage
from magicdrive_core.synthetic.ground import (
    MAP_RANGE,
    SHADOW,
    WET,
    Ground,
    Labels,
    MapLayers,
    paint,
    prepare,
    read_layers,
    shade,
)
from magicdrive_core.synthetic.light import COARSE, Light, Picture, colourise, darken, light_of
from magicdrive_core.synthetic.scenery import Scenery, load_scenery
from magicdrive_core.synthetic.sky import paint_sky
from magicdrive_core.synthetic.solids import Colour, Faces, Solids, faces_of, fill, mirrored, visible
from magicdrive_core.utils.files import sync_folder, write_unsynced
from magicdrive_core.utils.progress import progress_bar

Array = NDArray[np.float64]

QUALITY = 88  # JPEG quality
LIT = 70.0  # metres within which street lamps light the ground
MIRRORED = 45.0  # metres within which wet roads mirror solids
MIRROR_SHARE = 0.42  # weight of the mirror image in the colour of the road
BATCH = 24  # pictures in each task of a process
HALO_RADIUS = 700.0  # radius in pixels of the halo of a lamp at one metre
SMALLEST, LARGEST = 3, 14  # limits of the radius of a halo, in cells of COARSE pixels


def add_halos(picture: Picture, lamps: list[tuple[Pixels, Colour, float]], strength: int) -> None:
    """Add halos around shining faces, in integer arithmetic.

    Args:
        picture: (900, 1600, 3) blue, green, red; changed in place.
        lamps: outline, colour and distance in metres of each shining face.
        strength: brightness of the centre of a halo, in percent of the lamp's colour.
    """
    rows, columns = PICTURE_HEIGHT // COARSE + 1, PICTURE_WIDTH // COARSE
    cells = np.zeros((rows, columns, 3), np.int32)
    for outline, colour, away in lamps:
        low, high = outline.min(axis=0), outline.max(axis=0)
        x, y = ((low + high) // 2) >> SHIFT
        if not (0 <= x < PICTURE_WIDTH and 0 <= y < PICTURE_HEIGHT) or max(high - low) >> SHIFT > 120:
            continue  # a shop window nearby, not a lamp
        if tuple(picture[y, x]) != colour:
            continue  # occluded
        radius = int(np.clip(HALO_RADIUS / away / COARSE, SMALLEST, LARGEST))
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
    """Compute a bright spot from 0 to 1024 that fades out at ``radius`` cells: (2 radius + 1, 2 radius + 1)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    share = np.maximum(1024 - 1024 * (x * x + y * y) // (radius * radius), 0)
    return (share * share // 1024 * share // 1024).astype(np.int32)


@dataclass(frozen=True)
class StaticWorld:
    """Map and scenery of a location, prepared for drawing."""

    ground: Ground
    scenery: Solids  # on the plane z = 0
    lamps: Array  # (M, 2) street lamps


def prepare_world(layers: MapLayers, scenery: Scenery) -> StaticWorld:
    """Prepare everything that depends on the map only.

    Args:
        layers: the layers of the map.
        scenery: the scenery of the map.

    Returns:
        The ground, the scenery as solids on the plane z = 0, and the positions of street lamps.
    """
    boxes = scenery.boxes
    c, s, zero = np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))
    rotations = np.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], axis=1).reshape(-1, 3, 3)
    ids = -1 - np.arange(len(boxes))
    solids = Solids(scenery.names, boxes[:, :3], boxes[:, 3:6], rotations, np.ones(len(boxes)), ids)
    lamps = boxes[[name == "street_lamp" for name in scenery.names], :2]
    return StaticWorld(prepare(layers), solids, lamps.reshape(-1, 2))


def draw(camera: PosedCamera, light: Light, world: StaticWorld, movers: Solids) -> Picture:
    """Render what a camera sees.

    Args:
        camera: the camera, with the ground plane below the ego car.
        light: lighting of the scene.
        world: map and scenery.
        movers: the annotated objects at the time of the picture.

    Returns:
        (900, 1600, 3) blue, green, red.
    """
    labels = np.zeros((PICTURE_HEIGHT, PICTURE_WIDTH), np.uint8)
    paint_sky(labels, camera)
    paint(labels, world.ground, camera)
    solids = visible(movers.joined(on_ground(world.scenery, camera)), camera, MAP_RANGE)
    shade(labels, _shadows(solids, light), camera)
    picture = colourise(labels, camera, light)
    lamps = world.lamps[np.linalg.norm(world.lamps - camera.eye[:2], axis=1) < LIT]
    if light.dark:
        darken(picture, camera, lamps)
    faces = faces_of(solids, camera, light, lamps)
    if light.wet:
        _mirror(picture, labels, faces, camera)
    shining = fill(picture, faces, camera)
    if light.shining:
        add_halos(picture, shining, 60 if light.dark else 22)
    return picture


def encode(picture: Picture) -> bytes:
    """Encode a picture as JPEG.

    Args:
        picture: (900, 1600, 3) blue, green, red.

    Returns:
        The bytes of the file.

    Raises:
        MagicDriveError: OpenCV cannot encode it.
    """
    done, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise MagicDriveError("a picture could not be encoded as JPEG")
    return jpeg.tobytes()


def on_ground(scenery: Solids, camera: PosedCamera) -> Solids:
    """Select scenery near the camera and put it on the ground plane.

    Args:
        scenery: solids of ``StaticWorld``: their centres are those of their bottoms.
        camera: the camera, whose ground plane may be tilted.

    Returns:
        The solids within ``MAP_RANGE``, with the centres of their boxes.
    """
    near = np.flatnonzero(np.linalg.norm(scenery.centres[:, :2] - camera.eye[:2], axis=1) < MAP_RANGE)
    chosen = scenery.select(near)
    ground = np.column_stack([chosen.centres[:, :2], np.ones(len(near))]) @ camera.lift[2]
    centres = np.column_stack([chosen.centres[:, :2], ground + chosen.sizes[:, 2] / 2])
    return replace(chosen, centres=centres)


def _shadows(solids: Solids, light: Light) -> Array:
    """Compute shadows as quadrilaterals (Q, 4, 2) on the ground: footprints; in the sun also tops and sides."""
    foot = solids.footprints
    if not light.sun:
        return foot
    top = foot + (solids.sizes[:, 2, None] * light.shadow_step)[:, None]
    after, top_after = np.roll(foot, -1, axis=1), np.roll(top, -1, axis=1)
    sides = np.stack([foot, after, top_after, top], axis=2)  # (N, 4, 4, 2)
    quads = np.concatenate([foot[:, None], top[:, None], sides], axis=1)  # (N, 6, 4, 2)
    return rearrange(quads, "n q k c -> (n q) k c")


def _mirror(picture: Picture, labels: Labels, faces: Faces, camera: PosedCamera) -> None:
    """Mirror faces in wet roads, in place."""
    first = int(np.clip(camera.horizon - 40, 0, PICTURE_HEIGHT - 1))  # the horizon may be tilted
    image = picture.copy()
    fill(image, mirrored(faces, camera, MIRRORED), camera)
    ground = picture[first:]
    mixed = cv2.addWeighted(image[first:], MIRROR_SHARE, ground, 1 - MIRROR_SHARE, 0)
    wet = np.isin(np.arange(256) & ~SHADOW, WET).astype(np.uint8)
    cv2.copyTo(mixed, cv2.LUT(labels[first:], wet), ground)


def render_missing(root: Path, version: str, workers: int | None = None) -> int:
    """Render every missing picture of a data root from its tables and map expansion.

    Args:
        root: the data root; pictures are written below it.
        version: name of the table folder.
        workers: number of processes, by default one per core; the bytes do not depend on it.

    Returns:
        The number of rendered pictures.

    Raises:
        MagicDriveError: tables or maps are missing or damaged, the disk is full, or a process was killed.
    """
    missing = [
        replace(scene, shots=[shot for shot in scene.shots if not (root / shot.filename).is_file()])
        for scene in read_footage(root, version)
    ]
    tasks = [replace(scene, shots=shots) for scene in missing for shots in _batches(scene.shots)]
    total = sum(len(task.shots) for task in tasks)
    folders = {(root / shot.filename).parent for task in tasks for shot in task.shots}
    for location in sorted({task.location for task in tasks}):
        read_layers(root, location)  # report a missing map once, not from each process
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
    """Run tasks and yield the number of pictures of each when it is finished."""
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
                "a process that renders pictures was killed",
                "free some memory and run again; finished pictures are reused",
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare_process() -> None:
    """Make OpenCV single-threaded and switch off Intel's IPP, whose results depend on the processor."""
    cv2.setNumThreads(1)
    cv2.ipp.setUseIPP(False)


@cache
def _world(root: Path, location: str) -> StaticWorld:
    return prepare_world(read_layers(root, location), load_scenery(root, location))


def _draw_task(root: Path, scene: Footage) -> int:
    world, light = _world(root, scene.location), light_of(scene.description, scene.location)
    for shot in scene.shots:
        picture = draw(shot.camera, light, world, scene.solids_at(shot.timestamp))
        write_unsynced(root / shot.filename, encode(picture))
    return len(scene.shots)
