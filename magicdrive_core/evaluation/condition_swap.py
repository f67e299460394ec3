"""Condition swaps: clips are generated again from the same noise with one condition of another clip.

What changes in the pictures shows what the network takes from that condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import Edits
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import ClipConditions, Scene
from magicdrive_core.inference.items import Window, list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.inference.sampler import Sampler
from magicdrive_core.utils.progress import track
from magicdrive_core.video.colour import Picture

# Fields of ``ClipConditions`` that belong to each condition.
FIELDS = {
    "map": ("bev_map",),
    "boxes": ("box_corners", "box_classes", "box_masks", "box_ids"),
    "text": ("caption",),
}


@dataclass(frozen=True, kw_only=True)
class _SwappedSampler(Sampler):
    """Samples an item from its own noise with some conditions of another item.

    Attributes:
        other: Sampler of the other item.
        fields: Fields of ``ClipConditions`` that are taken from it.
    """

    other: Sampler
    fields: tuple[str, ...]

    @property
    def objects(self) -> list[str]:
        """Instance tokens of the clip whose boxes are shown."""
        return self.other.objects if "box_ids" in self.fields else super().objects

    def conditions(self, window: Window) -> ClipConditions:
        """Return the item's conditions of a window, with the swapped fields of the other item.

        Args:
            window: Frames of the clip that are sampled together.

        Returns:
            Conditions of the window's frames.
        """
        theirs = self.other.conditions(window)
        return replace(super().conditions(window), **{name: getattr(theirs, name) for name in self.fields})


def draw_swapped(
    config: Config,
    stage_folder: Path,
    scenes: Sequence[Scene],
    others: Sequence[Scene],
    what: str,
    project: Path = Path(),
) -> list[Picture]:
    """Generate validation scenes, each with one condition of another scene and all its other conditions unchanged.

    Args:
        config: All settings.
        stage_folder: A finished training run.
        scenes: The validation scenes.
        others: For each of them, a scene of the same length whose condition it gets.
        what: The swapped condition, a key of ``FIELDS``.
        project: The project's folder.

    Returns:
        The first frame (H, W, 3) of each scene, view by view: V pictures of the first scene, then V of the second.

    Raises:
        MagicDriveError: The stage is not finished, or its weights do not fit the settings (``Models.load``).
    """
    models, maps = Models.load(config, stage_folder, project), BevMaps(config, project)
    items = {item.clip.scene: item for item in list_items(config, scenes, project) if item.generation == 0}
    pictures: list[Picture] = []
    for scene, other in zip(track(scenes, f"condition swap: {what}"), others, strict=True):
        theirs = Sampler(config, models, items[other.token], other, Edits(), maps)
        sampler = _SwappedSampler(
            config, models, items[scene.token], scene, Edits(), maps, other=theirs, fields=FIELDS[what]
        )
        pictures += [next(frames) for frames in sampler.decode_views(sampler.sample(SingleProcess()))]
    return pictures
