"""Data formats: what the house asks of the recordings of a rig. Everything after the infos knows scenes and maps alone.

To bring another rig, write one file with a class that fulfils ``Adapter``, and name it in ``open_adapter`` and in
``data.format`` (config.py). ``argoverse.py`` is the shortest example, ``scenes.py`` the first one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from magicdrive_core.config.schema import Config
from magicdrive_core.data.records import Scene
from magicdrive_core.data.vector_maps import VectorMap


class Adapter(Protocol):
    """Recordings of one data set.

    What a scene must be: six views in the order of ``cameras.VIEWS``; 12 Hz, every key frame followed by the frames
    up to the next one; a lidar frame with x to the right and y forward; boxes of the ten ``CLASSES`` in the lidar frame
    of their own frame. Intrinsics belong to 1600x900 pixels: ``cameras.full_window`` says which part of a picture of
    another size these are.
    """

    @property
    def root(self) -> Path:
        """The folder that the paths of pictures are relative to."""

    def names(self) -> list[str]:
        """The names of all scenes, sorted; names of files can be made of them.

        Raises:
            MagicDriveError: the data set as a whole cannot be read: the file is named.
        """

    def read(self, name: str, split: str) -> Scene:
        """One scene, the same bytes every time.

        Raises:
            MagicDriveError: a file, record or field is missing or impossible: named. The other scenes can still be
                read (``data.skip_bad``).
        """

    def pictures(self, scene: Scene) -> dict[str, tuple[int, int]]:
        """The width and height that each picture of a scene must have, by path below the root."""

    def digest(self) -> str:
        """Changes with all that ``read`` reads, so that scenes of an interrupted stage are known again."""

    def map_digest(self) -> str:
        """Changes with all that ``vector_map`` reads."""

    def vector_map(self, scene: Scene) -> VectorMap:
        """The map around a scene, without reading what ``names`` and ``read`` need.

        Raises:
            MagicDriveError: missing or broken: named.
        """


def open_adapter(config: Config, project: Path = Path()) -> Adapter:
    """The adapter of ``data.format``; nothing is read yet. ``data.root`` is relative to the project's folder."""
    if config.data.format == "argoverse2":
        from magicdrive_core.data.argoverse import Argoverse

        return Argoverse(config, project)
    from magicdrive_core.data.nuscenes_scenes import NuScenesScenes

    return NuScenesScenes(config, project)
