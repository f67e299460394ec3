"""The conditions of clips: built from a scene, augmented in training, and the stage that prepares maps for all of them.

BEV maps are drawn once for all frames (``map_cache``); everything else is computed from the infos when a clip is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config.schema import Config, fingerprint, parse_size
from magicdrive_core.config.versions import BEV_MAPS_VERSION
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.clips import caption, list_clips
from magicdrive_core.data.infos import infos_digest, read_scenes
from magicdrive_core.data.map_cache import draw_maps, used_cells
from magicdrive_core.data.records import CLASSES, Clip, ClipConditions, FrameBoxes, Scene, SceneHeader
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.boxes import corners
from magicdrive_core.utils.files import resumable_folder, write_json

Floats = NDArray[np.float64]

HIDDEN, NO_BOX, SHOWN = -1, 0, 1  # values of ClipConditions.box_masks
ANCHOR = 6  # published: every sixth frame of a clip is taken as a key frame
MOST_ADDED = 3  # boxes out of view that ``add_boxes`` shows at once
FPS = 12
FPS_OF_STILLS = 120  # the published frame rate condition of single frames


def clip_conditions(scene: Scene, clip: Clip, size: str, bits: NDArray[np.uint8], *, published: bool) -> ClipConditions:
    """Build the conditions of a clip.

    Args:
        scene: the clip's scene.
        clip: frames of the scene.
        size: height and width of the video, such as "224x400".
        bits: (F, h, w) BEV maps of the clip's frames; bit c of a cell is layer c.
        published: put every box corner h/2 too high, as the published weights expect (oddity 2).

    Returns:
        The conditions, with a box slot for each object that any frame of the clip holds, sorted by instance token.
        Single frames have the frame rate ``FPS_OF_STILLS``.
    """
    frames = slice(clip.start, clip.start + clip.frames)
    assert len(bits) == clip.frames
    height, width = parse_size(size)
    camera_to_lidar = scene.camera_to_lidar[frames]
    ids, box_corners, box_classes, box_masks = _boxes(scene.boxes[frames], camera_to_lidar, published=published)
    return ClipConditions(
        caption=caption(scene),
        cameras=np.concatenate([scene.intrinsics[frames], camera_to_lidar[..., :3, :]], axis=-1),
        ego_motion=ego_motion(scene.ego_to_global[frames] @ scene.lidar_to_ego[frames]),
        box_corners=box_corners,
        box_classes=box_classes,
        box_masks=box_masks,
        box_ids=ids,
        bev_map=bits,
        height=height,
        width=width,
        fps=FPS if clip.frames > 1 else FPS_OF_STILLS,
    )


def ego_motion(lidar_to_global: Floats) -> Floats:
    """Compute the motion from the first lidar frame to each lidar frame; entries below 1e-6 are set to 0 as published.

    Args:
        lidar_to_global: (F, 4, 4) poses of the lidar.

    Returns:
        (F, 4, 4) matrices from the first lidar frame to each lidar frame; the first one is the identity.
    """
    motion = poses.inverse(lidar_to_global) @ lidar_to_global[0]
    motion[np.abs(motion) < 1e-6] = 0.0
    return motion


def _boxes(
    frames: list[FrameBoxes], camera_to_lidar: Floats, *, published: bool
) -> tuple[list[str], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Sort boxes into slots, one for each object of the clip: ids, corners, classes and masks of ``ClipConditions``.

    A box is shown to a view (mask 1) if any of its corners is in front of the camera, inside the picture or not.
    """
    ids = sorted({token for frame in frames for token in frame.ids})
    slots = {token: slot for slot, token in enumerate(ids)}
    F, N, V = len(frames), len(ids), camera_to_lidar.shape[1]
    lidar_to_depth = poses.inverse(camera_to_lidar)[..., 2, :]  # F, V, 4: the camera's z of a point in the lidar frame
    box_corners = np.zeros((F, N, 8, 3), np.float32)
    box_classes = np.full((F, N), -1, np.int64)
    box_masks = np.zeros((F, V, N), np.int64)
    for index, frame in enumerate(frames):
        columns = [slots[token] for token in frame.ids]
        exact = corners(frame.boxes)
        depth = np.einsum("vk,nck->vnc", lidar_to_depth[index, :, :3], exact) + lidar_to_depth[index, :, None, None, 3]
        box_corners[index, columns] = corners(frame.boxes, published=True) if published else exact
        box_classes[index, columns] = [CLASSES.index(name) for name in frame.names]
        box_masks[index][:, columns] = (depth > 0).any(-1)
    return ids, box_corners, box_classes, box_masks


def anchor_frames(scene: Scene, clip: Clip, *, published: bool) -> NDArray[np.bool_]:
    """Mark the frames of a clip whose boxes are never hidden: its key frames.

    Args:
        scene: the clip's scene.
        clip: frames of the scene.
        published: mark every sixth frame of the clip instead, wherever the clip starts (oddity 17).

    Returns:
        (F,) booleans.
    """
    if published:
        return np.arange(clip.frames) % ANCHOR == 0
    return scene.key_frames[clip.start : clip.start + clip.frames]


def hide_boxes(
    conditions: ClipConditions, always: NDArray[np.bool_], probability: float, rng: np.random.Generator
) -> ClipConditions:
    """Hide all boxes in all views of random frames.

    Args:
        conditions: conditions of a clip; they are not changed.
        always: (F,) frames whose boxes are never hidden, see ``anchor_frames``.
        probability: of hiding a frame's boxes.
        rng: source of randomness; F numbers are drawn.

    Returns:
        A copy of the conditions whose box masks are ``HIDDEN`` in the chosen frames, for every view and slot.
    """
    hidden = (rng.random(len(always)) < probability) & ~always
    return replace(conditions, box_masks=np.where(hidden[:, None, None], HIDDEN, conditions.box_masks))


def add_boxes(conditions: ClipConditions, probability: float, rng: np.random.Generator) -> ClipConditions:
    """Show one to three boxes that are out of view, in random views and frames.

    Args:
        conditions: conditions of a clip; they are not changed.
        probability: of adding boxes to a view of a frame.
        rng: source of randomness.

    Returns:
        A copy of the conditions, where some masks of objects that are present are ``SHOWN`` instead of ``NO_BOX``.
    """
    masks = conditions.box_masks.copy()
    for frame, view in np.argwhere(rng.random(masks.shape[:2]) < probability):
        present = conditions.box_classes[frame] >= 0
        unseen = np.flatnonzero(present & (masks[frame, view] == NO_BOX))
        count = min(len(unseen), int(rng.integers(1, MOST_ADDED + 1)))
        masks[frame, view, rng.permutation(unseen)[:count]] = SHOWN
    return replace(conditions, box_masks=masks)


def drop_frames(frames: int, ratio: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose the frames that keep their boxes and ego motion: all but ``int(ratio * (frames - 2))``.

    Args:
        frames: length of the clip; its first and last frame always keep theirs.
        ratio: share of the other frames that lose theirs.
        rng: source of randomness.

    Returns:
        (frames,) booleans.
    """
    keep = np.ones(frames, np.bool_)
    if frames > 2:
        keep[1 + rng.permutation(frames - 2)[: int(ratio * (frames - 2))]] = False
    return keep


def build_conditions(config: Config, infos: Path | str, out: Path | str) -> None:
    """Write ``bev/<cells>/<scene token>.npz`` and ``clips.json`` to a folder, completely or not at all.

    An interrupted run resumes after the scenes that are drawn. With ``conditions.maps: live`` no maps are written.

    Args:
        config: the whole configuration.
        infos: the infos folder.
        out: the conditions folder.

    Raises:
        MagicDriveError: infos or maps are unusable (the message names them), or the disk has too little space.
    """
    scenes = read_scenes(infos)
    maps = open_adapter(config).map_digest()
    key = fingerprint(
        *(config.conditions, config.data, infos_digest(infos), maps, used_cells(config), BEV_MAPS_VERSION)
    )
    with resumable_folder(out, key) as folder:
        if config.conditions.maps == "cached":
            draw_maps(config, scenes, folder)
        write_json(folder / "clips.json", count_clips(config, [SceneHeader.of(scene) for scene in scenes]))


def count_clips(config: Config, scenes: Sequence[SceneHeader]) -> dict[str, dict[str, dict[str, int]]]:
    """Count clips by split, size and length, for every training bucket and for generation.

    Args:
        config: the whole configuration.
        scenes: headers of all scenes.

    Returns:
        Numbers of clips by split ("train", "val"), video size such as "224x400", and number of frames in digits
        ("whole" for buckets of whole scenes).
    """
    buckets = [bucket for stage in config.training.stages for bucket in config.training.stage(stage).buckets]
    kinds = {(bucket.resolution, bucket.frames, bucket.whole) for bucket in buckets}
    kinds.add((config.generate.resolution, config.generate.frames, False))
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for split in ("train", "val"):
        for size, frames, whole in sorted(kinds):
            clips = list_clips(scenes, split, frames, config.latents.start_stride, whole=whole)
            counts.setdefault(split, {}).setdefault(size, {})["whole" if whole else str(frames)] = len(clips)
    return counts
