"""BEV maps of clips: read from what the conditions stage wrote, or drawn when they are asked for (conditions.maps)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.config import Config
from magicdrive_core.data.adapters import open_adapter
from magicdrive_core.data.bev import rasterise, read_map
from magicdrive_core.data.records import Clip, Scene

Bits = NDArray[np.uint8]


class BevMaps:
    """The maps of a project. Both ways give the same bits.

    Args:
        config: data and conditions.
        project: the project's folder.
    """

    def __init__(self, config: Config, project: Path = Path()) -> None:
        self._cells, self._live = config.conditions.map_cells, config.conditions.maps == "live"
        self._folder = project / "artifacts/conditions"
        self._adapter = open_adapter(config, project)

    def of_scene(self, scene: Scene, size: str, *, draw: bool = False) -> Bits:
        """The maps of a whole scene, (F, cells, cells), bit c = layer c.

        Args:
            scene: where the lidar is.
            size: of the video, for example "224x400".
            draw: even where the cache has them, because the scene's poses are not those of the infos.

        Raises:
            MagicDriveError: the cache or the map is missing or broken.
        """
        return self.of_clip(scene, Clip(scene.token, 0, len(scene)), size, draw=draw)

    def of_clip(self, scene: Scene, clip: Clip, size: str, *, draw: bool = False) -> Bits:
        """The maps of a clip's frames, as ``of_scene``."""
        frames = slice(clip.start, clip.start + clip.frames)
        if draw or self._live:
            lidar_to_global = scene.ego_to_global[frames] @ scene.lidar_to_ego[frames]
            return rasterise(self._adapter.vector_map(scene), lidar_to_global, self._cells[size])
        return read_map(self._folder, scene.token, self._cells[size])[frames]
