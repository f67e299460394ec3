"""Which clips a scene is cut into, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence

from magicdrive_core.data.records import Clip, Scene


def list_clips(scenes: Sequence[Scene], split: str, frames: int, stride: int) -> list[Clip]:
    """The clips of a split, scene by scene in time order.

    Args:
        scenes: all scenes; those of the split "both" belong to each.
        split: "train": a clip begins at every ``stride``-th frame, single frames are the key frames; "val": each
            scene gives one clip, from its first frame on.
        frames: of a clip; scenes that are shorter give none.
        stride: in frames.
    """
    clips = []
    for scene in scenes:
        if scene.split not in (split, "both"):
            continue
        starts: Sequence[int]
        if split == "val":
            starts = range(min(1, len(scene) - frames + 1))
        elif frames == 1:
            starts = scene.key_frames.nonzero()[0].tolist()
        else:
            starts = range(0, len(scene) - frames + 1, stride)
        clips += [Clip(scene.token, start, frames) for start in starts]
    return clips


def caption(scene: Scene) -> str:
    """The text of every clip of a scene."""
    return f"A driving scene image at {scene.location}. {scene.description}."


def full_length(frames: int) -> int:
    """How much of a scene of so many frames the published system takes as a whole: 8n or 8n + 1 frames."""
    return frames if frames % 8 == 0 else frames - (frames - 1) % 8
