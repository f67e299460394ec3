"""Map expansion files: shapes that many records name are drawn once, and what is damaged is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicdrive_core.data.bev_maps import rasterise
from magicdrive_core.data.records import MAP_LAYERS, Scene
from magicdrive_core.data.vector_maps import VectorMap, load_map
from magicdrive_core.errors import MagicDriveError

Values = dict[str, Any]
BLOCKS, NODES = 676, 7748  # as in map expansion 1.3 of singapore-queenstown


def ring_round(values: Values, nodes: int = NODES) -> list[str]:
    """Add nodes on a wavy ring round the whole map; return their tokens."""
    xs, ys = ([node[axis] for node in values["node"]] for axis in "xy")
    radius = max(max(xs) - min(xs), max(ys) - min(ys)) / 2
    ring = [
        {
            "token": f"ring-{n}",
            "x": (max(xs) + min(xs)) / 2 + radius * math.cos(2 * math.pi * n / nodes) * (1 + 0.2 * math.sin(n / 40)),
            "y": (max(ys) + min(ys)) / 2 + radius * math.sin(2 * math.pi * n / nodes) * (1 + 0.2 * math.sin(n / 40)),
        }
        for n in range(nodes)
    ]
    values["node"] += ring
    return [node["token"] for node in ring]


@pytest.fixture
def edit_map(root_copy: Path, scenes: list[Scene]) -> Callable[[Callable[[Values], Any]], VectorMap]:
    """Edit the map of the first scene and load it."""
    path = root_copy / f"maps/expansion/{scenes[0].location}.json"

    def edit(change: Callable[[Values], Any]) -> VectorMap:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        load_map.cache_clear()
        return load_map(root_copy, scenes[0].location)

    return edit


def test_a_ring_that_676_road_blocks_name_is_drawn_once(edit_map: Any, scenes: list[Scene]) -> None:
    def add(values: Values) -> None:
        values["polygon"].append({"token": None, "exterior_node_tokens": ring_round(values), "holes": []})
        values["road_block"] = [{"token": f"block-{n}", "polygon_token": None} for n in range(BLOCKS)]

    vectors = edit_map(add)
    blocks = np.flatnonzero(vectors.layers == MAP_LAYERS.index("road_block"))
    assert len(blocks) == 1
    assert vectors.offsets[blocks[0] + 1] - vectors.offsets[blocks[0]] == NODES
    poses = (scenes[0].ego_to_global @ scenes[0].lidar_to_ego)[:2]
    bits = rasterise(vectors, poses, 50)
    assert (bits >> MAP_LAYERS.index("road_block")).all()


def test_a_shape_named_again_is_drawn_at_its_last_place(edit_map: Any, scenes: list[Scene]) -> None:
    """The hole of one polygon in another: what is drawn last decides."""

    def square(values: Values, token: str, centre: Any, half: float) -> list[str]:
        corners = [(-half, -half), (half, -half), (half, half), (-half, half)]
        for number, (x, y) in enumerate(corners):
            values["node"].append({"token": f"{token}{number}", "x": centre[0] + x, "y": centre[1] + y})
        return [f"{token}{number}" for number in range(4)]

    pose = (scenes[0].ego_to_global @ scenes[0].lidar_to_ego)[:1]
    layer = MAP_LAYERS.index("carpark_area")

    def add(values: Values) -> None:
        hole = {"node_tokens": square(values, "h", pose[0, :2, 3], 10)}
        values["polygon"] += [
            {"token": "ring", "exterior_node_tokens": square(values, "r", pose[0, :2, 3], 40), "holes": [hole]},
            {"token": "full", "exterior_node_tokens": square(values, "f", pose[0, :2, 3], 20), "holes": []},
        ]
        names = ("ring", "full", "ring")
        values["carpark_area"] = [{"token": f"c{n}", "polygon_token": name} for n, name in enumerate(names)]

    bits = rasterise(edit_map(add), pose, 100)[0] >> layer & 1
    assert not bits[50, 50]  # the ring, drawn last, clears its hole
    assert bits[25, 50]


def first(values: Values, layer: str) -> Values:
    """The shape that the first record of a layer names."""
    record = values[layer][0]
    if "line_token" in record:
        return next(line for line in values["line"] if line["token"] == record["line_token"])
    token = record["polygon_tokens"][0] if "polygon_tokens" in record else record["polygon_token"]
    return next(polygon for polygon in values["polygon"] if polygon["token"] == token)


def shape_with(layer: str, **fields: Any) -> Callable[[Values], None]:
    return lambda values: first(values, layer).update(fields)


def some_nodes(count: int) -> Callable[[Values], list[str]]:
    return lambda values: [node["token"] for node in values["node"][:count]]


DAMAGED: dict[str, tuple[Callable[[Values], Any], str]] = {
    "outline of two nodes": (
        lambda v: first(v, "walkway").update(exterior_node_tokens=some_nodes(2)(v)),
        r"polygon .* has a ring of fewer than three nodes",
    ),
    "hole of two nodes": (
        lambda v: first(v, "drivable_area").update(holes=[{"node_tokens": some_nodes(2)(v)}]),
        r"polygon .* has a ring of fewer than three nodes",
    ),
    "empty outline with a hole": (
        lambda v: first(v, "walkway").update(exterior_node_tokens=[], holes=[{"node_tokens": some_nodes(3)(v)}]),
        r"polygon .* has a ring of fewer than three nodes",
    ),
    "line of one node": (
        lambda v: first(v, "lane_divider").update(node_tokens=some_nodes(1)(v)),
        r"line .* has a single node",
    ),
    "null for a layer": (lambda v: v.update(walkway=None), "the layer walkway is not a list of records"),
    "null for a record": (lambda v: v.update(walkway=[None]), "the layer walkway is not a list of records"),
    "null for nodes": (shape_with("walkway", exterior_node_tokens=None), "nodes of polygon .* are not a list"),
    "null for holes": (shape_with("walkway", holes=None), "holes of polygon .* is not a list of records"),
    "a text for an x": (
        lambda v: [node.update(x="3") for node in v["node"]],
        "node .* is not at two finite numbers",
    ),
    "NaN for a y": (lambda v: [node.update(y=math.nan) for node in v["node"]], "is not at two finite numbers"),
    "a node beyond the Earth": (
        lambda v: [node.update(y=1e300) for node in v["node"]],
        "is not finite or farther than 21,000 km",
    ),
    "a list for a token": (lambda v: v["node"][0].update(token=[]), r"a token of node is \[\], expected a text"),
    "a missing node": (
        shape_with("walkway", exterior_node_tokens=["gone"] * 3),
        "node has no record 'gone', which another record names",
    ),
    "two polygons of one token": (
        lambda v: v["polygon"].append({**first(v, "walkway"), "exterior_node_tokens": []}),
        "two different records of polygon have the token",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_map_is_named_in_one_line(edit_map: Any, change: Callable[[Values], Any], message: str) -> None:
    with pytest.raises(MagicDriveError, match=rf"maps/expansion/[\w-]+\.json: .*{message}") as error:
        edit_map(change)
    assert "\n" not in str(error.value)
