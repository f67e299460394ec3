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
        hold: bytes of whole scenes' maps that are kept, the ones that were asked for last.
    """

    def __init__(self, config: Config, project: Path = Path(), *, hold: int = 0) -> None:
        self._cells, self._live = config.conditions.map_cells, config.conditions.maps == "live"
        self._folder = project / "artifacts/conditions"
        self._adapter = open_adapter(config, project)
        self._hold = hold
        self._held: dict[tuple[str, int], Bits] = {}  # the one that was asked for last is the last one

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
        return self._read(scene.token, self._cells[size])[frames]

    @property
    def held(self) -> int:
        """Bytes that are kept now."""
        return sum(bits.nbytes for bits in self._held.values())

    def _read(self, token: str, cells: int) -> Bits:
        bits = self._held.pop((token, cells), None)
        if bits is None:
            bits = read_map(self._folder, token, cells)
        self._held[token, cells] = bits
        while self._held and self.held > self._hold:
            del self._held[next(iter(self._held))]
        return bits
