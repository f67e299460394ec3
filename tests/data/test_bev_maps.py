"""BEV maps equal the masks of the devkit, and unusable vector maps are refused with their names."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from nuscenes.map_expansion.map_api import NuScenesMap, NuScenesMapExplorer

from magicdrive_core.data.bev_maps import rasterise, unpack
from magicdrive_core.data.nuscenes_scenes import build_scene
from magicdrive_core.data.nuscenes_tables import load_tables
from magicdrive_core.data.records import MAP_LAYERS, Scene
from magicdrive_core.data.vector_maps import VectorMap, load_map
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses


@pytest.fixture
def devkit_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch devkit 1.2, which cannot iterate lines of several parts under shapely 2, to draw them part by part."""

    def draw(lines: shapely.Geometry, mask: np.ndarray) -> np.ndarray:
        for line in shapely.get_parts(lines):
            cv2.polylines(mask, [shapely.get_coordinates(line).astype(np.int32)], False, 1, 2)
        return mask

    monkeypatch.setattr(NuScenesMapExplorer, "mask_for_lines", staticmethod(draw))


def devkit_map(devkit: NuScenesMap, lidar_to_global: np.ndarray, cells: int) -> np.ndarray:
    patch = (lidar_to_global[0, 3], lidar_to_global[1, 3], 100, 100)
    angle = np.degrees(poses.yaw(lidar_to_global))
    return devkit.get_map_mask(patch, angle, list(MAP_LAYERS), (cells, cells)).transpose(0, 2, 1)


def compare(root: Path, location: str, lidar_to_global: np.ndarray, cells: int) -> np.ndarray:
    """Compute the IoU with the devkit by layer over all frames; NaN if neither draws anything."""
    devkit = NuScenesMap(str(root), location)
    theirs = np.stack([devkit_map(devkit, pose, cells) for pose in lidar_to_global])
    ours = unpack(rasterise(load_map(root, location), lidar_to_global, cells))
    with np.errstate(invalid="ignore"):
        return (theirs & ours).sum((0, 2, 3)) / (theirs | ours).sum((0, 2, 3))


@pytest.mark.parametrize("cells", [200, 400])
def test_a_generated_map_equals_the_devkits(
    synthetic_root: Path, scenes: list[Scene], devkit_lines: None, cells: int
) -> None:
    scene = scenes[0]
    frames = (scene.ego_to_global @ scene.lidar_to_ego)[::3]
    iou = compare(synthetic_root, scene.location, frames, cells)
    assert np.isfinite(iou).sum() >= 6
    assert np.nanmin(iou) >= 0.999


@pytest.mark.parametrize("cells", [200, 400])
def test_real_maps_equal_the_devkits(shared: Path, devkit_lines: None, cells: int) -> None:
    drive = shared / "data/nuscenes-drive"
    tables = load_tables(drive, "v1.0-drive")
    scene = build_scene(tables, tables.scene[0], "both", published=False)
    frames = (scene.ego_to_global @ scene.lidar_to_ego)[::20]
    assert np.nanmin(compare(drive, "boston-seaport", frames, cells)) >= 0.999
    # a real drivable area with 130 holes, at positions and headings all over it
    one = shared / "data/nuscenes-one"
    rng = np.random.default_rng(0)
    places = rng.choice(load_map(one, "singapore-onenorth").points, 8)
    frames = np.stack(
        [poses.pose([np.cos(a), 0, 0, np.sin(a)], [*p, 0]) for a, p in zip(rng.random(8), places, strict=True)]
    )
    assert np.nanmin(compare(one, "singapore-onenorth", frames, cells)) >= 0.999


def square(layer: str, hole: bool, low: float, high: float) -> tuple[int, bool, np.ndarray]:
    return MAP_LAYERS.index(layer), hole, np.array([[low, low], [high, low], [high, high], [low, high]])


def test_holes_bits_and_axes_follow_the_layout() -> None:
    vectors = VectorMap.of(
        [
            square("drivable_area", False, -20, 20),
            square("drivable_area", True, -10, 10),
            (MAP_LAYERS.index("walkway"), False, np.array([[30.0, -5], [40, -5], [40, 5], [30, 5]])),
            (MAP_LAYERS.index("lane_divider"), False, np.array([[0.0, -200], [0, 200]])),
        ]
    )
    drivable, walkway, divider = 1 << 0, 1 << 2, 1 << 6

    def at(x: float, y: float) -> int:
        return int(bits[int(100 + 2 * x), int(100 + 2 * y)])  # cells of half a metre

    (bits,) = rasterise(vectors, np.eye(4)[None], 200)
    assert at(15, 15) == at(-15, 3) == drivable
    assert at(3, 5) == at(25, 25) == 0  # in the hole, and outside
    assert at(35, 0) == walkway  # along the x axis of the lidar
    assert at(0, 35) == divider  # along the y axis
    assert at(0, 15) == drivable | divider
    turned = np.eye(4)
    turned[:2, :2] = [[0, -1], [1, 0]]  # x axis of the lidar along the global y
    (bits,) = rasterise(vectors, turned[None], 200)
    assert at(0, -35) == walkway  # now to the right
    assert at(35, 0) == divider


def test_a_patch_inside_a_polygon_is_full_and_one_far_away_is_empty() -> None:
    vectors = VectorMap.of([square("carpark_area", False, -500, 500)])
    far = np.eye(4)
    far[0, 3] = 5000
    near_bits, far_bits = rasterise(vectors, np.stack([np.eye(4), far]), 50)
    assert (near_bits == 1 << 4).all()
    assert not far_bits.any()
    assert not rasterise(VectorMap.of([]), np.eye(4)[None], 50).any()


def test_unusable_map_files_are_named(synthetic_root: Path, scenes: list[Scene], tmp_path: Path) -> None:
    location = scenes[0].location
    folder = tmp_path / "maps" / "expansion"
    folder.mkdir(parents=True)
    values = json.loads((synthetic_root / "maps" / "expansion" / f"{location}.json").read_text())

    def refused(name: str, text: str, message: str) -> None:
        (folder / f"{name}.json").write_text(text)
        with pytest.raises(MagicDriveError, match=message) as error:
            load_map(tmp_path, name)
        assert "v1.3" in error.value.hint

    refused("old", json.dumps(values | {"version": "1.2"}), "has map version 1.2, expected 1.3")
    refused("older", json.dumps({key: value for key, value in values.items() if key != "version"}), "version None")
    refused("list", "[]", "not a map expansion")
    refused("broken", "{", "not valid JSON")
    refused("nodes", json.dumps(values | {"node": values["node"][1:]}), "has no record")
    with pytest.raises(MagicDriveError, match="is missing"):
        load_map(tmp_path, "nowhere")


def test_layers_that_a_map_lacks_are_empty(tmp_path: Path) -> None:
    folder = tmp_path / "maps" / "expansion"
    folder.mkdir(parents=True)
    (folder / "bare.json").write_text('{"version": "1.3", "node": [], "polygon": [], "line": []}')
    assert not rasterise(load_map(tmp_path, "bare"), np.eye(4)[None], 40).any()
