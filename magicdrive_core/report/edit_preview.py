"""A preview of edits: the conditions of a scene before and after them. Needs no network and no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.clips import caption
from magicdrive_core.data.edits import Edits, edit_scene
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import Scene
from magicdrive_core.utils.files import atomic_file
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.scene_views import SceneViews
from magicdrive_core.video.sheets import contact_sheet, six_views

VIEW_WIDTH = 400  # pixels of a view


def draw_preview(config: Config, scene: Scene, edits: Edits, frame: int, out: Path, project: Path = Path()) -> None:
    """Write a PNG with boxes and map in six views and from above, before and after the edits.

    Args:
        config: All settings.
        scene: The scene without edits.
        edits: The edits to show.
        frame: Index of the shown frame.
        out: The PNG to write.
        project: The project's folder.

    Raises:
        MagicDriveError: The map of the scene is missing or broken, or the disk is full.
    """
    rows = []
    edited = edit_scene(scene, edits)
    maps = BevMaps(config, project)
    for shown, draw in ((scene, False), (edited, edits.moves_lidar(scene.name))):
        bits = maps.of_scene(shown, config.generate.resolution, draw=draw)
        rows.append(_row(SceneViews(shown, bits, project / config.data.root, VIEW_WIDTH), frame))
    title = f"{scene.name}, frame {frame}"
    sheet = contact_sheet(rows, ["before", "after"], title=title, subtitle=caption(edited))
    with atomic_file(out) as partial:
        Image.fromarray(sheet).save(partial, format="PNG")


def list_objects(scene: Scene) -> list[tuple[str, str, int, float]]:
    """List the objects of a scene, nearest first.

    Args:
        scene: The scene, with or without edits.

    Returns:
        For each object: instance token, class, number of frames that show it, and the least horizontal distance of its
        centre to the lidar in metres.
    """
    seen: dict[str, tuple[str, int, float]] = {}
    for boxes in scene.boxes:
        for token, name, distance in zip(boxes.ids, boxes.names, np.hypot(*boxes.boxes[:, :2].T), strict=True):
            _, count, least = seen.get(token, (name, 0, np.inf))
            seen[token] = name, count + 1, min(least, float(distance))
    return sorted(((token, *facts) for token, facts in seen.items()), key=lambda row: (row[3], row[0]))


def _row(scene_views: SceneViews, frame: int) -> list[Picture]:
    grid = six_views(scene_views.conditions(frame))
    return [grid, scene_views.bev(frame, grid.shape[0])]
