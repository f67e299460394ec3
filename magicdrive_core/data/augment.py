"""What training changes in a clip's conditions, so that the network does not lean on boxes being complete."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import Clip, ClipConditions, Scene

HIDDEN, NO_BOX, SHOWN = -1, 0, 1
ANCHOR = 6  # published: every sixth frame of a clip is taken for a key frame
MOST_ADDED = 3


def anchors(scene: Scene, clip: Clip, *, published: bool) -> NDArray[np.bool_]:
    """The frames of a clip (F) that always show their boxes: its key frames.

    published: those whose index in the clip is a multiple of six, wherever the clip begins (oddity 17).
    """
    if published:
        return np.arange(clip.frames) % ANCHOR == 0
    return scene.key_frames[clip.start : clip.start + clip.frames]


def hide_boxes(
    conditions: ClipConditions, always: NDArray[np.bool_], probability: float, rng: np.random.Generator
) -> ClipConditions:
    """Hides all boxes in all views of some frames, but not of those (F) that ``always`` show them."""
    hidden = (rng.random(len(always)) < probability) & ~always
    return replace(conditions, box_masks=np.where(hidden[:, None, None], HIDDEN, conditions.box_masks))


def add_boxes(conditions: ClipConditions, probability: float, rng: np.random.Generator) -> ClipConditions:
    """Shows one to three boxes of the frame that a view does not see, in some views and frames."""
    masks = conditions.box_masks.copy()
    for frame, view in np.argwhere(rng.random(masks.shape[:2]) < probability):
        present = conditions.box_classes[frame] >= 0
        unseen = np.flatnonzero(present & (masks[frame, view] == NO_BOX))
        count = min(len(unseen), int(rng.integers(1, MOST_ADDED + 1)))
        masks[frame, view, rng.permutation(unseen)[:count]] = SHOWN
    return replace(conditions, box_masks=masks)


def drop_frames(frames: int, ratio: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which frames keep their boxes and ego motion: all but ``int(ratio * (frames - 2))`` between first and last."""
    keep = np.ones(frames, np.bool_)
    if frames > 2:
        keep[1 + rng.permutation(frames - 2)[: int(ratio * (frames - 2))]] = False
    return keep
