"""The interface between a data set and the project: all later steps see only ``Scene`` objects and vector maps.

To add a data set, write one module with a class that implements ``Adapter``, and name it in ``open_adapter`` and in the
setting ``data.format``. ``argoverse.py`` is the shortest example, ``nuscenes_scenes.py`` the first one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from magicdrive_core.config.schema import Config
from magicdrive_core.data.records import Scene
from magicdrive_core.data.vector_maps import VectorMap


class Adapter(Protocol):
    """Recordings of one data set.

    A scene must have six views in the order of ``cameras.VIEWS``; frames at 12 Hz, each key frame followed by the
    frames up to the next one; a lidar frame with x to the right and y forward; boxes of the ten ``CLASSES``, each in
    the lidar frame of its own video frame. Intrinsics are given for 1600x900 pixels; ``cameras.full_window`` says which
    part of a picture of another size these cover.
    """

    @property
    def root(self) -> Path:
        """The folder that picture paths are relative to."""

    def names(self) -> list[str]:
        """List the names of all scenes.

        Returns:
            Distinct names, sorted and usable as file names.

        Raises:
            MagicDriveError: the data set as a whole cannot be read; the message names the file.
        """

    def read(self, name: str, split: str) -> Scene:
        """Read one scene; every call returns the same values.

        Args:
            name: one of ``names()``.
            split: "train", "val" or "both", stored in the scene.

        Returns:
            The scene at 12 Hz, with the views, lidar frame, boxes and intrinsics that the class describes.

        Raises:
            MagicDriveError: a file, record or field is missing or impossible; the message names it. Other scenes can
                still be read (``data.skip_bad``).
        """

    def pictures(self, scene: Scene) -> dict[str, tuple[int, int]]:
        """Look up the size that each picture of a scene must have.

        Args:
            scene: a scene that ``read`` returned.

        Returns:
            (width, height) in pixels by path below the root, for every path of ``scene.pictures``.
        """

    def digest(self) -> str:
        """Digest everything that ``read`` reads; an interrupted stage resumes only under an equal digest.

        Returns:
            64 hex digits.
        """

    def map_digest(self) -> str:
        """Digest everything that ``vector_map`` reads.

        Returns:
            64 hex digits.
        """

    def vector_map(self, scene: Scene) -> VectorMap:
        """Read the map around a scene, without the files that ``names`` and ``read`` need.

        Args:
            scene: the scene; its name and location identify the map.

        Returns:
            The map, in metres of the global frame of the scene's poses.

        Raises:
            MagicDriveError: the map is missing or broken; the message names it.
        """


def open_adapter(config: Config, project: Path = Path()) -> Adapter:
    """Create the adapter of ``data.format``; no file is read yet.

    Args:
        config: the whole configuration.
        project: the project's folder, which ``data.root`` is relative to.

    Returns:
        The adapter of Argoverse 2 for "argoverse2", otherwise that of nuScenes.
    """
    if config.data.format == "argoverse2":
        from magicdrive_core.data.argoverse import Argoverse

        return Argoverse(config, project)
    from magicdrive_core.data.nuscenes_scenes import NuScenesScenes

    return NuScenesScenes(config, project)
