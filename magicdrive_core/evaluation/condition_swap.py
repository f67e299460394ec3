"""Clips under changed conditions: generated again from the same noise with one condition of another clip, or edited.

What changes in the pictures shows what the network takes from that condition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import Edits, edit_scene
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import ClipConditions, Scene
from magicdrive_core.inference.items import Item, Window
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.inference.sampler import Sampler

Video = NDArray[np.uint8]  # (V, F, H, W, 3) RGB

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


@dataclass(frozen=True)
class ClipPainter:
    """Generates clips in memory with the weights of a training run, which are loaded for the first clip.

    Attributes:
        config: All settings.
        stage_folder: A finished training run.
        project: The project's folder.

    Raises:
        MagicDriveError: The stage is not finished, or its weights do not fit the settings (``Models.load``).
    """

    config: Config
    stage_folder: Path
    project: Path = Path()

    def edited(self, item: Item, scene: Scene, edits: Edits) -> Video:
        """Generate a clip of an edited scene.

        Args:
            item: The clip.
            scene: Its scene, without edits.
            edits: The edits; those that change nothing give the clip that generation writes.

        Returns:
            The frames that are written (V, F, H, W, 3).
        """
        return self._video(Sampler(self.config, self._models, item, edit_scene(scene, edits), edits, self._maps))

    def swapped(self, item: Item, scene: Scene, other: Scene, what: str) -> Video:
        """Generate a clip with one condition of another scene and all its other conditions unchanged.

        Args:
            item: The clip.
            scene: Its scene.
            other: A scene of the same length, at least, whose condition it gets.
            what: The swapped condition, a key of ``FIELDS``.

        Returns:
            The frames that are written (V, F, H, W, 3).
        """
        common = self.config, self._models, item
        theirs = Sampler(*common, other, Edits(), self._maps)
        return self._video(_SwappedSampler(*common, scene, Edits(), self._maps, other=theirs, fields=FIELDS[what]))

    @staticmethod
    def _video(sampler: Sampler) -> Video:
        latents = sampler.sample(SingleProcess())
        return np.stack([np.stack(list(frames)) for frames in sampler.decode_views(latents)])

    @cached_property
    def _models(self) -> Models:
        return Models.load(self.config, self.stage_folder, self.project)

    @cached_property
    def _maps(self) -> BevMaps:
        return BevMaps(self.config, self.project)
