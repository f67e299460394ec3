"""Write a city as nuScenes map expansion 1.3 and as a map mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.synthetic.city import Array, City, Lane
from magicdrive_core.synthetic.rig import rounded, token
from magicdrive_core.utils.files import atomic_file, write_json

# Sizes in metres of the four locations, which nuscenes-devkit hard-codes by name.
CANVAS = {
    "singapore-onenorth": [1585.6, 2025.0],
    "singapore-hollandvillage": [2808.3, 2922.9],
    "singapore-queenstown": [3228.6, 3687.1],
    "boston-seaport": [2979.5, 2118.1],
}
MASK_CELLS = 10  # cells of the map mask for each metre
CURVE_SPACING = 2.0  # metres between points on the edges of curved lanes
Record = dict[str, Any]


class _Expansion:
    """Collect the records of one map.

    Args:
        city: the city whose map is written.
    """

    def __init__(self, city: City) -> None:
        self.city = city
        self.nodes: list[Record] = []
        self.polygons: list[Record] = []
        self.lines: list[Record] = []

    def token(self, *names: object) -> str:
        """Make the token of a record of this map.

        Args:
            names: what tells the record apart from the others of the map.

        Returns:
            32 hex digits.
        """
        return token("map", self.city.location, *names)

    def add_nodes(self, owner: str, points: Array) -> list[str]:
        """Add a node for each point.

        Args:
            owner: what the points belong to: token of a line, or token of a polygon and number of its ring.
            points: (N, 2) metres.

        Returns:
            N tokens of nodes.
        """
        tokens = [self.token("node", owner, index) for index in range(len(points))]
        for node, point in zip(tokens, points, strict=True):
            x, y = rounded(point)
            self.nodes.append({"token": node, "x": x, "y": y})
        return tokens

    def add_polygon(self, layer: str, name: str, rings: list[Array]) -> str:
        """Add a polygon and its nodes.

        Args:
            layer: layer of the polygon.
            name: name of the polygon within the layer.
            rings: (n, 2) metres each, the outer one first, then the holes.

        Returns:
            Token of the polygon.
        """
        polygon = self.token("polygon", layer, name)
        outer, *holes = [self.add_nodes(f"{polygon}-{index}", ring) for index, ring in enumerate(rings)]
        self.polygons.append(
            {"token": polygon, "exterior_node_tokens": outer, "holes": [{"node_tokens": hole} for hole in holes]}
        )
        return polygon

    def add_line(self, layer: str, name: str, points: Array) -> tuple[str, list[str]]:
        """Add a line and its nodes.

        Args:
            layer: layer of the line.
            name: name of the line within the layer.
            points: (N, 2) metres.

        Returns:
            Token of the line, and the N tokens of its nodes.
        """
        line = self.token("line", layer, name)
        nodes = self.add_nodes(line, points)
        self.lines.append({"token": line, "node_tokens": nodes})
        return line, nodes

    def area_records(self, layer: str, **fields: Any) -> list[Record]:
        """Make the records of a layer of areas, and add their polygons.

        Args:
            layer: name of the layer, a key of ``City.areas``.
            fields: extra fields that each record gets.

        Returns:
            One record for each area of the city.
        """
        return [
            {
                "token": self.token(layer, area.name),
                "polygon_token": self.add_polygon(layer, area.name, area.rings),
                **({"road_segment_token": self.token("road_segment", area.road)} if area.road else {}),
                **fields,
            }
            for area in self.city.areas[layer]
        ]

    def lane_record(self, layer: str, lane: Lane) -> Record:
        """Make the record of a lane or connector, and add its polygon and lines.

        Args:
            layer: "lane" or "lane_connector".
            lane: the lane or connector.

        Returns:
            The record; that of a connector has no lines.
        """
        left, right = (lane.curve.points(CURVE_SPACING, side * self.city.layout.lane / 2) for side in (-1, 1))
        record: Record = {
            "token": self.token(layer, lane.name),
            "polygon_token": self.add_polygon(layer, lane.name, [np.concatenate([left, right[::-1]])]),
        }
        if layer == "lane_connector":
            return record
        record["lane_type"] = "CAR"
        for end, index in (("from", 0), ("to", -1)):
            edge = np.stack([left[index], right[index]])
            record[f"{end}_edge_line_token"] = self.add_line(layer, f"{lane.name}-{end}", edge)[0]
        for side, points in (("left", left), ("right", right)):
            nodes = self.add_line(layer, f"{lane.name}-{side}", points)[1]
            kind = "DOUBLE_DASHED_WHITE" if (side == "left") == bool(lane.index) else "SINGLE_SOLID_WHITE"
            record[f"{side}_lane_divider_segments"] = [{"node_token": node, "segment_type": kind} for node in nodes]
        return record

    def arclines(self, lane: Lane) -> list[Record]:
        """Convert the centre line of a lane to arcline paths: each piece is the first or middle part of one path.

        Args:
            lane: the lane or connector.

        Returns:
            One record for each piece of the curve; straight pieces have the radius 999.999.
        """
        out = []
        start = 0.0
        for length, curvature in lane.curve.pieces:
            ends = lane.curve.poses([start, start + length])
            lengths = [length, 0.0, 0.0] if curvature else [0.0, length, 0.0]
            out.append(
                {
                    "start_pose": rounded(ends[0], 6),
                    "end_pose": rounded(ends[1], 6),
                    "shape": "RSR" if curvature < 0 else "LSL",
                    "radius": round(1 / abs(curvature), 4) if curvature else 999.999,
                    "segment_length": rounded(lengths, 6),
                }
            )
            start += length
        return out


def write_expansion(root: Path, city: City) -> None:
    """Write ``maps/expansion/<location>.json``, which the devkit's ``NuScenesMap`` loads.

    Args:
        root: the data root.
        city: the city.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    parts = _Expansion(city)
    drivable = [parts.add_polygon("drivable_area", area.name, area.rings) for area in city.areas["drivable_area"]]
    crossings = [parts.token("ped_crossing", area.name) for area in city.areas["ped_crossing"]]
    stop_lines = parts.area_records("stop_line", stop_line_type="PED_CROSSING", traffic_light_tokens=[])
    for record, crossing in zip(stop_lines, crossings, strict=True):
        record["ped_crossing_tokens"] = [crossing]
        record["road_block_token"] = ""
    dividers: dict[str, list[Record]] = {"road_divider": [], "lane_divider": []}
    for layer, records in dividers.items():
        for name, points, road in city.lines[layer]:
            line, nodes = parts.add_line(layer, name, points)
            record = {"token": parts.token(layer, name), "line_token": line}
            record["road_segment_token"] = parts.token("road_segment", road)
            if layer == "lane_divider":
                kind = "SINGLE_DASHED_WHITE"
                record["lane_divider_segments"] = [{"node_token": node, "segment_type": kind} for node in nodes]
            records.append(record)
    road_segments = parts.area_records("road_segment", drivable_area_token=parts.token("drivable_area"))
    for record, area in zip(road_segments, city.areas["road_segment"], strict=True):
        del record["road_segment_token"]
        record["is_intersection"] = area.name.startswith("junction")
    tokens = {name: parts.token("lane", name) for name in city.lanes}
    tokens |= {name: parts.token("lane_connector", name) for name in city.connectors}
    connectivity: dict[str, dict[str, list[str]]] = {t: {"incoming": [], "outgoing": []} for t in tokens.values()}
    for name, successors in city.outgoing.items():
        for successor in successors:
            connectivity[tokens[name]]["outgoing"].append(tokens[successor])
            connectivity[tokens[successor]]["incoming"].append(tokens[name])
    expansion = {
        "version": "1.3",
        "canvas_edge": CANVAS[city.location],
        "drivable_area": [{"token": parts.token("drivable_area"), "polygon_tokens": drivable}],
        "road_segment": road_segments,
        "road_block": parts.area_records("road_block", from_edge_line_token="", to_edge_line_token=""),
        "lane": [parts.lane_record("lane", lane) for lane in city.lanes.values()],
        "lane_connector": [parts.lane_record("lane_connector", lane) for lane in city.connectors.values()],
        "ped_crossing": parts.area_records("ped_crossing"),
        "walkway": parts.area_records("walkway"),
        "stop_line": stop_lines,
        "carpark_area": parts.area_records("carpark_area", orientation=0.0, road_block_token=""),
        **dividers,
        "traffic_light": [],
        "connectivity": connectivity,
        "arcline_path_3": {
            tokens[lane.name]: parts.arclines(lane) for lane in (*city.lanes.values(), *city.connectors.values())
        },
        "node": parts.nodes,
        "polygon": parts.polygons,
        "line": parts.lines,
    }
    write_json(root / "maps" / "expansion" / f"{city.location}.json", expansion)


def mask_name(location: str) -> str:
    """Return the path of the map mask below the data root.

    Args:
        location: name of the map, such as "singapore-onenorth".

    Returns:
        The path as ``map.json`` names it.
    """
    return f"maps/{location}.png"


def write_mask(root: Path, city: City) -> None:
    """Write the map mask: 255 where cars drive or people walk.

    It starts at the origin of the map, as the devkit requires, and ends at the edge of the city instead of the canvas:
    the rest would be 630 million empty cells.

    Args:
        root: the data root.
        city: the city; ``MASK_CELLS`` cells of the mask are one metre.

    Raises:
        MagicDriveError: the mask cannot be encoded, or the disk is full or not writable.
    """
    width, height = (int(np.ceil(metres * MASK_CELLS)) for metres in city.size)
    mask = np.zeros((height, width), np.uint8)
    for layer in ("walkway", "drivable_area"):
        for area in city.areas[layer]:
            rings = [np.round(ring * MASK_CELLS).astype(np.int32) for ring in area.rings]
            cv2.fillPoly(mask, [ring * [1, -1] + [0, height - 1] for ring in rings], (255,))
    done, png = cv2.imencode(".png", mask)
    if not done:
        raise MagicDriveError(f"the map mask of {city.location} could not be encoded")
    with atomic_file(root / mask_name(city.location)) as partial:
        partial.write_bytes(png.tobytes())
