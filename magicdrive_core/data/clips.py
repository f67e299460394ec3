"""Cut scenes into clips, caption them, and balance training over weather."""

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
    """List the clips of a split, scene by scene in order of time.

    Args:
        scenes: all scenes; those of the split "both" belong to either split.
        split: "train": a clip starts at every ``stride``-th frame, single frames are the key frames; "val": each scene
            gives one clip, its first frames.
        frames: length of a clip; shorter scenes give none.
        stride: frames from the start of a clip to the start of the next.
        whole: take one clip from each scene, as long as possible with 8n+1 frames and at most ``frames``; ``stride`` is
            not used.

    Returns:
        The clips, in the order of the scenes.
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
    """Write the caption that all clips of a scene share.

    Args:
        scene: the scene or its header; location and description are used.
        say_daytime: put "Daytime. " before the description; training on balanced weather does so for scenes that are
            neither night nor rain.

    Returns:
        The caption in the form "A driving scene image at <location>. <description>."
    """
    daytime = "Daytime. " if say_daytime else ""
    return f"A driving scene image at {scene.location}. {daytime}{scene.description}."


def weather_groups(description: str, *, published: bool = False) -> list[str]:
    """Find the weather groups of a description.

    Args:
        description: description of a scene.
        published: match substrings instead of words, so that "train" and "terrain" count as rain (oddity 20).

    Returns:
        "night", "rain" or both; ["none"] for other descriptions.
    """
    text = description.lower()
    if published:
        found = [weather for weather in ("night", "rain") if weather in text]
    else:
        words = set(re.findall(r"[a-z]+", text))
        found = [weather for weather, forms in WEATHER_WORDS.items() if words & forms]
    return found or ["none"]


def balance_weather(scenes: Sequence[AnyScene], *, published: bool = False) -> list[AnyScene]:
    """Repeat the scenes of each weather group as often as the group fits into the largest one.

    Args:
        scenes: scenes or headers; a scene of both night and rain is in both groups.
        published: match substrings, see ``weather_groups``.

    Returns:
        The scenes of the groups night, rain and none, each group repeated as a whole.
    """
    groups: dict[str, list[AnyScene]] = {"night": [], "rain": [], "none": []}
    for scene in scenes:
        for weather in weather_groups(scene.description, published=published):
            groups[weather].append(scene)
    most = max((len(group) for group in groups.values()), default=0)
    return [scene for group in groups.values() if group for _ in range(most // len(group)) for scene in group]
