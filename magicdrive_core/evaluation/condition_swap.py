"""Which condition rules the picture: clips drawn anew with one condition of another clip."""

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

# By the condition that is exchanged: what it is of ``ClipConditions``.
FIELDS = {
    "map": ("bev_map",),
    "boxes": ("box_corners", "box_classes", "box_masks", "box_ids"),
    "text": ("caption",),
}


@dataclass(frozen=True, kw_only=True)
class _Exchanged(Sampler):
    """Samples the item with its own noise, told the ``fields`` of another item's conditions."""

    other: Sampler
    fields: tuple[str, ...]

    @property
    def objects(self) -> list[str]:
        return self.other.objects if "box_ids" in self.fields else super().objects

    def conditions(self, window: Window) -> ClipConditions:
        theirs = self.other.conditions(window)
        return replace(super().conditions(window), **{name: getattr(theirs, name) for name in self.fields})


def draw_exchanged(
    config: Config,
    stage_folder: Path,
    scenes: Sequence[Scene],
    others: Sequence[Scene],
    what: str,
    project: Path = Path(),
) -> list[Picture]:
    """Draws validation scenes, each told one condition of another scene, and all else of its own.

    Args:
        config: sampling settings.
        stage_folder: a finished training run.
        scenes: for validation.
        others: for each of them the scene whose condition it gets, as long as it is.
        what: a key of ``FIELDS``.
        project: the project's folder.

    Returns:
        The first frame (H, W, 3) of every scene, view by view.
    """
    models, maps = Models.load(config, stage_folder, project), BevMaps(config, project)
    items = {item.clip.scene: item for item in list_items(config, scenes, project) if item.generation == 0}
    pictures: list[Picture] = []
    for scene, other in zip(track(scenes, f"another clip's {what}"), others, strict=True):
        theirs = Sampler(config, models, items[other.token], other, Edits(), maps)
        sampler = _Exchanged(
            config, models, items[scene.token], scene, Edits(), maps, other=theirs, fields=FIELDS[what]
        )
        pictures += [next(frames) for frames in sampler.decode_views(sampler.sample(SingleProcess()))]
    return pictures
