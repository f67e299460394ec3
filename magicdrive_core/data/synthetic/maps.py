"""A map expansion's polygons and lines, read without the devkit: workers that draw import little."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicdrive_core.data.records import MAP_LAYERS
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import read_json

Array = NDArray[np.float64]
LINE_LAYERS = ("road_divider", "lane_divider")


@dataclass(frozen=True)
class MapShapes:
    """The eight layers that the model knows, in metres of the global frame."""

    polygons: dict[str, list[list[Array]]]  # by layer: rings (K, 2) of each polygon, the outer one first
    lines: dict[str, list[Array]]  # by layer: points (K, 2) of each line


def read_shapes(root: Path, location: str) -> MapShapes:
    """Reads ``maps/expansion/<location>.json``.

    Raises:
        MagicDriveError: the file is missing, damaged, or of a version before 1.3.
    """
    path = root / "maps" / "expansion" / f"{location}.json"
    hint = "unpack nuScenes' map expansion 1.3 into maps/"
    expansion = read_json(path, hint)
    version = expansion.get("version", "before 1.3") if isinstance(expansion, dict) else "before 1.3"
    if version != "1.3":
        raise MagicDriveError(f"{path} has version {version}, but 1.3 is needed", hint)
    try:
        return _shapes(expansion)
    except KeyError as error:
        raise MagicDriveError(f"{path} is damaged: it lacks {error}", hint) from None


def _shapes(expansion: dict[str, Any]) -> MapShapes:
    nodes = {node["token"]: (node["x"], node["y"]) for node in expansion["node"]}

    def points(tokens: list[str]) -> Array:
        return np.array([nodes[token] for token in tokens], dtype=np.float64).reshape(-1, 2)

    rings = {
        record["token"]: [
            points(record["exterior_node_tokens"]),
            *(points(hole["node_tokens"]) for hole in record["holes"]),
        ]
        for record in expansion["polygon"]
    }
    lines = {record["token"]: points(record["node_tokens"]) for record in expansion["line"]}
    polygons = {}
    for layer in MAP_LAYERS:
        if layer not in LINE_LAYERS:
            records = expansion[layer]
            tokens = [t for record in records for t in record.get("polygon_tokens") or [record["polygon_token"]]]
            polygons[layer] = [rings[token] for token in tokens]
    return MapShapes(
        polygons=polygons,
        lines={layer: [lines[record["line_token"]] for record in expansion[layer]] for layer in LINE_LAYERS},
    )
