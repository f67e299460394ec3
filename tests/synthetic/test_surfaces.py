"""Surfaces: every pixel finds the same point in another picture, exactly, and only where that picture shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import Framing, project
from magicdrive_core.synthetic.camera import PosedCamera
from magicdrive_core.synthetic.footage import Footage, read_footage
from magicdrive_core.synthetic.ground import read_layers
from magicdrive_core.synthetic.light import DAY, light_of
from magicdrive_core.synthetic.render import StaticWorld, draw, prepare_world
from magicdrive_core.synthetic.scenery import load_scenery
from magicdrive_core.synthetic.solids import Solids
from magicdrive_core.synthetic.surfaces import GROUND, NONE, SKY, Correspondence, Surfaces, correspond, draw_surfaces

FULL = Framing(900, 1600)
SMALL = Framing(224, 400)


@pytest.fixture(scope="module")
def day(synthetic_root: Path) -> tuple[Footage, StaticWorld]:
    footage = next(f for f in read_footage(synthetic_root, "v1.0-demo") if light_of(f.description) == DAY)
    layers = read_layers(synthetic_root, footage.location)
    return footage, prepare_world(layers, load_scenery(synthetic_root, footage.location))


@pytest.fixture(scope="module")
def moments(day: tuple[Footage, StaticWorld]) -> Callable[[str, int], tuple[PosedCamera, Solids]]:
    """Camera and objects of a view's n-th picture."""
    footage, _ = day

    def of(view: str, number: int) -> tuple[PosedCamera, Solids]:
        shots = sorted((s for s in footage.shots if f"/{view}/" in s.filename), key=lambda s: s.timestamp)
        return shots[number].camera, footage.solids_at(shots[number].timestamp)

    return of


def _nothing() -> Solids:
    return Solids([], *np.empty((2, 0, 3)), np.empty((0, 3, 3)), np.empty(0), np.empty(0, np.int64))


def _error(picture: np.ndarray, other: np.ndarray, found: Correspondence) -> float:
    warped = cv2.remap(other, found.at, None, cv2.INTER_LINEAR)
    return float(np.abs(warped.astype(np.float64) - picture)[found.valid].mean())


@pytest.mark.parametrize("view", ["CAM_FRONT", "CAM_BACK_LEFT"])
def test_the_flow_of_a_static_scene_carries_one_drawing_onto_the_next(
    day: tuple[Footage, StaticWorld], moments: Callable, view: str
) -> None:
    _, world = day
    cameras = [moments(view, number)[0] for number in (3, 2)]
    pictures = [draw(camera, DAY, world, _nothing()) for camera in cameras]
    now, before = (draw_surfaces(camera, world, _nothing()) for camera in cameras)
    found = correspond(now, before, FULL)
    assert found.valid.mean() > 0.85
    still = replace(found, at=_grid(FULL).astype(np.float32))
    assert _error(pictures[0], pictures[1], found) < 0.1 * _error(pictures[0], pictures[1], still)
    assert _error(pictures[0], pictures[1], found) < 1.0


def test_a_point_of_the_ground_is_found_where_independent_geometry_projects_it(
    day: tuple[Footage, StaticWorld], moments: Callable
) -> None:
    _, world = day
    (camera, movers), (other, others) = moments("CAM_FRONT", 3), moments("CAM_FRONT", 2)
    now, before = draw_surfaces(camera, world, movers), draw_surfaces(other, world, others)
    found = correspond(now, before, SMALL)
    pixels = _pixels(SMALL)
    chosen = found.valid & (now.seen_at(pixels) == GROUND)
    homogeneous = np.concatenate([pixels[chosen], np.ones((chosen.sum(), 1))], axis=1)
    rays = homogeneous @ np.linalg.inv(camera.intrinsics).T @ camera.camera_to_global[:3, :3].T
    points = camera.eye - rays * (camera.eye[2] / rays[:, 2])[:, None]  # the generated city is the plane z = 0
    there, _ = project(poses.transform(poses.inverse(other.camera_to_global), points), other.intrinsics)
    assert len(points) > 20_000
    np.testing.assert_allclose(found.at[chosen], there / 4 - [0.5, 1.5], atol=1e-3)


def test_a_moving_car_takes_its_pixels_along_and_a_standing_camera_moves_no_others(
    day: tuple[Footage, StaticWorld], moments: Callable
) -> None:
    world = _without_scenery(day[1])
    camera, _ = moments("CAM_FRONT", 0)
    ahead = camera.eye + 14 * camera.camera_to_global[:3, 2]
    car = _solid("car", (ahead[0], ahead[1], 0.85), (1.95, 4.6, 1.7))
    moved = replace(car, centres=car.centres + 0.4 * camera.camera_to_global[:3, 0])  # to the right, along the picture
    now, later = draw_surfaces(camera, world, car), draw_surfaces(camera, world, moved)
    pixels, grid = _pixels(SMALL), _grid(SMALL)
    found = correspond(now, later, SMALL)
    still, moving = found.valid & (now.seen_at(pixels) >= GROUND), found.valid & (now.seen_at(pixels) == 0)
    np.testing.assert_allclose(found.at[still], grid[still], atol=1e-3)
    steps = found.at[moving] - grid[moving]
    assert len(steps) > 400
    np.testing.assert_allclose(steps[:, 0], 0.1 * camera.intrinsics[0, 0] / now.depths(pixels)[moving], rtol=1e-3)
    np.testing.assert_allclose(steps[:, 1], 0, atol=0.02)
    uncovered = (now.seen_at(pixels) == 0) & (later.seen_at(pixels) >= GROUND)  # ground that only one picture shows
    assert uncovered.sum() > 20
    assert not correspond(later, now, SMALL).valid[uncovered].any()


def test_the_far_side_of_a_box_is_not_found_in_a_picture_of_its_near_side(day: tuple[Footage, StaticWorld]) -> None:
    camera, world = day[0].shots[0].camera, _without_scenery(day[1])
    ahead = camera.eye + 10 * camera.camera_to_global[:3, 2]
    box = _solid("barrier", (ahead[0], ahead[1], 0.9), (2.0, 2.0, 1.8))
    turned = poses.pose(np.diag([-1.0, -1, 1]), [2 * ahead[0], 2 * ahead[1], 0.0])  # half a turn around the box
    opposite = PosedCamera(camera.intrinsics, turned @ camera.camera_to_global, turned @ camera.ego_to_global)
    one, other = draw_surfaces(camera, world, box), draw_surfaces(opposite, world, box)
    found = correspond(one, other, SMALL)
    columns, rows = (_pixels(SMALL)[..., axis].astype(int) for axis in (0, 1))
    faces = one.faces[rows, columns]
    sides = (faces != NONE) & (np.abs(one.planes[faces] @ _up(one)) < 1e-6)
    assert sides.sum() > 1_000
    assert found.valid[sides].mean() < 0.05  # the upright edges are seen from both sides


def _solid(name: str, centre: tuple[float, float, float], size: tuple[float, float, float]) -> Solids:
    return Solids([name], np.array([centre]), np.array([size]), np.eye(3)[None], np.ones(1), np.zeros(1, np.int64))


def _without_scenery(world: StaticWorld) -> StaticWorld:
    return replace(world, scenery=world.scenery.select(np.arange(0)))


def _grid(framing: Framing) -> np.ndarray:
    """Column and row of each pixel of a video, (H, W, 2)."""
    return np.stack(np.meshgrid(np.arange(framing.width), np.arange(framing.height)), axis=-1)


def _pixels(framing: Framing) -> np.ndarray:
    """The middles of a video's pixels in the full picture, (H, W, 2)."""
    return (_grid(framing) + np.array([0.5, 0.5 + framing.crop])) / framing.ratio


def _up(surfaces: Surfaces) -> np.ndarray:
    return np.asarray(surfaces.camera.camera_to_global[:3, :3].T @ [0, 0, 1.0])


def test_neighbouring_cameras_show_the_same_points_in_the_same_colours(
    day: tuple[Footage, StaticWorld], moments: Callable
) -> None:
    _, world = day
    for view, neighbour in (("CAM_FRONT_LEFT", "CAM_FRONT"), ("CAM_BACK", "CAM_BACK_LEFT")):
        (camera, movers), (other, others) = moments(view, 2), moments(neighbour, 2)
        one, two = draw_surfaces(camera, world, movers), draw_surfaces(other, world, others)
        found = correspond(one, two, SMALL)
        assert 0.01 < found.valid.mean() < 0.3
        pictures = [
            cv2.resize(draw(c, DAY, world, m), (400, 225), interpolation=cv2.INTER_AREA)[1:]
            for c, m in ((camera, movers), (other, others))
        ]
        mirrored = [picture[:, ::-1].copy() for picture in pictures]
        assert _error(pictures[0], pictures[1], found) < 5
        assert _error(pictures[0], pictures[1], found) < 0.3 * _error(pictures[0], mirrored[1], found)


def test_opposite_cameras_share_nothing(day: tuple[Footage, StaticWorld], moments: Callable) -> None:
    _, world = day
    front, back = (draw_surfaces(*_placed(moments(view, 2), world)) for view in ("CAM_FRONT", "CAM_BACK"))
    assert not correspond(front, back, SMALL).valid.any()


def _placed(moment: tuple[PosedCamera, Solids], world: StaticWorld) -> tuple[PosedCamera, StaticWorld, Solids]:
    return moment[0], world, moment[1]


def test_every_pixel_is_a_solid_the_ground_or_the_sky(day: tuple[Footage, StaticWorld], moments: Callable) -> None:
    _, world = day
    camera, movers = moments("CAM_FRONT", 2)
    surfaces = draw_surfaces(camera, world, movers)
    grid = np.stack(np.meshgrid(np.arange(0, 1600, 7), np.arange(0, 900, 7)), axis=-1) + 0.5
    ids = surfaces.seen_at(grid)
    assert set(np.unique(ids)) - {GROUND, SKY} <= set(surfaces.solids.ids.tolist())
    np.testing.assert_array_equal(np.isfinite(surfaces.depths(grid)), ids < GROUND)
