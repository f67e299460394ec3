"""Which clips a scene is cut into, and what is said about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from magicdrive_core.data.records import Clip, Scene, SceneHeader

AnyScene = TypeVar("AnyScene", Scene, SceneHeader)

WEATHER_WORDS = {"night": {"night"}, "rain": {"rain", "rainy", "raining"}}


def list_clips(
    scenes: Sequence[Scene] | Sequence[SceneHeader], split: str, frames: int, stride: int, *, whole: bool = False
) -> list[Clip]:
    """The clips of a split, scene by scene in time order.

    Args:
        scenes: all scenes; those of the split "both" belong to each.
        split: "train": a clip begins at every ``stride``-th frame, single frames are the key frames; "val": each
            scene gives one clip, from its first frame on.
        frames: of a clip; scenes that are shorter give none.
        stride: in frames.
        whole: one clip a scene, of the most 8n+1 frames that it has, up to ``frames``.
    """
    clips = []
    for scene in scenes:
        if scene.split not in (split, "both"):
            continue
        if whole:
            clips.append(Clip(scene.token, 0, min(frames, (len(scene) - 1) // 8 * 8 + 1)))
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


def caption(scene: Scene | SceneHeader, *, say_daytime: bool = False) -> str:
    """The text of every clip of a scene.

    Args:
        scene: its location and description are said.
        say_daytime: "Daytime. " in front of the description: of scenes of neither night nor rain, where balanced scenes
            are trained on.
    """
    daytime = "Daytime. " if say_daytime else ""
    return f"A driving scene image at {scene.location}. {daytime}{scene.description}."


def weather_groups(description: str, *, published: bool = False) -> list[str]:
    """Which of "night", "rain" and "none" a description speaks of, by word.

    Args:
        description: of a scene.
        published: by substring, so that a train and a terrain are rain (oddity 20).
    """
    text = description.lower()
    if published:
        found = [weather for weather in ("night", "rain") if weather in text]
    else:
        words = set(re.findall(r"[a-z]+", text))
        found = [weather for weather, forms in WEATHER_WORDS.items() if words & forms]
    return found or ["none"]


def balance_weather(scenes: Sequence[AnyScene], *, published: bool = False) -> list[AnyScene]:
    """Scenes of night, of rain and of neither, each group repeated as often as it fits into the largest one.

    A scene of both night and rain is in both groups.
    """
    groups: dict[str, list[AnyScene]] = {"night": [], "rain": [], "none": []}
    for scene in scenes:
        for weather in weather_groups(scene.description, published=published):
            groups[weather].append(scene)
    most = max((len(group) for group in groups.values()), default=0)
    return [scene for group in groups.values() if group for _ in range(most // len(group)) for scene in group]
