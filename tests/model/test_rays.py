"""Rays of the cameras against geometry worked out by hand: what they meet, and what the network makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from magicdrive_core.geometry.boxes import corners
from magicdrive_core.model.rays import HALF_DEPTH, LIDAR_HEIGHT, box_features, camera_rays, ground_features, in_view
from magicdrive_core.parallel.gradient_order import arrival_order
from tests.model.networks import conditions, network, noisy

UP = torch.tensor([0.0, 0.0, 1.0])
CLASSES = 10
ORIGIN = torch.zeros(3)
AHEAD = torch.tensor([[0.0, 1.0, 0.0]])  # along the lidar's y axis


def box(x: float, y: float, z: float, turn: float = 0.0, size: tuple[float, ...] = (2.0, 4.0, 1.5)) -> Tensor:
    return torch.from_numpy(corners(np.array([[x, y, z, *size, turn]]))).float()


def met(rays: Tensor, *boxes: Tensor, shown: list[bool] | None = None) -> Tensor:
    all_corners = torch.cat(boxes)
    kinds = torch.arange(len(all_corners))
    return box_features(ORIGIN, rays, all_corners, kinds, torch.tensor(shown or [True] * len(kinds)), CLASSES)


def test_a_ray_meets_the_near_side_of_a_box() -> None:
    near, *kind, width, length, height = met(AHEAD, box(0, 20, 0)).tolist()[0]
    assert near == pytest.approx(HALF_DEPTH / (HALF_DEPTH + 18))
    assert kind == [1.0] + [0.0] * 9
    assert (width, length, height) == pytest.approx((0, -1, 0), abs=1e-5)


def test_the_nearer_box_hides_the_farther_one_in_any_order() -> None:
    first, second = met(AHEAD, box(0, 20, 0), box(0, 30, 0)), met(AHEAD, box(0, 30, 0), box(0, 20, 0))
    assert first[0, 1] == second[0, 2] == 1
    assert first[0, 0] == second[0, 0]


@pytest.mark.parametrize("place", [(0, -20, 0), (5, 20, 0), (0, 0, 0)], ids=["behind", "beside", "around the camera"])
def test_a_ray_past_a_box_meets_nothing(place: tuple[float, float, float]) -> None:
    assert not met(AHEAD, box(*place)).any()


def test_a_box_that_is_not_shown_is_not_met() -> None:
    assert met(AHEAD, box(0, 20, 0), box(0, 30, 0), shown=[False, True])[0, 2] == 1
    assert not met(AHEAD, torch.zeros(1, 8, 3), shown=[False]).any()


@settings(deadline=None, max_examples=40)
@given(st.floats(-20, 20), st.floats(8, 40), st.floats(-math.pi, math.pi), st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_a_ray_to_a_point_of_a_box_finds_its_place(x: float, y: float, turn: float, u: float, v: float) -> None:
    own = box(x, y, 0.3, turn)
    centre, axes = own[0].mean(0), (own[0, [4, 3, 1]] - own[0, 0]) / 2
    inner = centre + u * axes[0] + v * axes[1]
    near, *_, width, length, height = met((inner / inner.norm())[None], own).tolist()[0]
    depth = HALF_DEPTH / near - HALF_DEPTH
    place = centre + torch.tensor([width, length, height]) @ axes
    torch.testing.assert_close(place, inner / inner.norm() * depth, atol=1e-3, rtol=0)
    assert max(abs(width), abs(length), abs(height)) == pytest.approx(1, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-math.pi, math.pi), st.floats(200, 1300), st.floats(700, 900))
def test_every_box_that_a_ray_meets_is_in_view(x: float, y: float, turn: float, focal: float, middle: float) -> None:
    looking_along_y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # columns: right, down, ahead
    intrinsics = torch.tensor([[focal, 0.0, middle], [0.0, focal, 450.0], [0.0, 0.0, 1.0]])
    camera = torch.cat([intrinsics, looking_along_y, torch.zeros(3, 1)], dim=1)
    pixels = torch.cartesian_prod(torch.arange(2.0, 1600, 4), torch.arange(200.0, 700, 20))
    own = box(x, y, 0.2, turn)
    assert in_view(camera, own) or not met(camera_rays(camera, pixels)[1], own).any()
    assert not in_view(camera, box(0, -8 - abs(y), 0))


def test_the_ground_is_looked_up_where_a_ray_meets_it() -> None:
    bev_map = torch.zeros(8, 100, 100)  # cells of one metre; rows along the lidar's x axis, columns along its y axis
    bev_map[3, 53, 60] = 1
    place = torch.tensor([3.5, 10.5, -LIDAR_HEIGHT])
    near, *layers = ground_features(ORIGIN, (place / 10.5)[None], UP, bev_map).tolist()[0]
    assert near == pytest.approx(HALF_DEPTH / (HALF_DEPTH + 10.5))
    assert layers == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0], abs=1e-4)


def test_the_ground_is_not_met_above_the_horizon_and_unknown_beyond_the_map() -> None:
    bev_map = torch.ones(8, 100, 100)
    rays = torch.tensor([[0.0, 1.0, 0.1], [0.0, 1.0, 0.0], [0.0, 1.0, -LIDAR_HEIGHT / 60]])
    features = ground_features(ORIGIN, rays, UP, bev_map)
    assert not features[:2].any()
    assert features[2, 0] > 0
    assert not features[2, 1:].any()


def test_a_tilted_lidar_finds_the_same_ground() -> None:
    angle = 0.03
    tilt = torch.tensor([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    bev_map = torch.rand(8, 100, 100, generator=torch.Generator().manual_seed(0))
    rays = torch.tensor([[0.2, 1.0, -0.1], [-0.4, 1.0, -0.2]])
    torch.testing.assert_close(
        ground_features(ORIGIN, rays @ tilt.T, tilt @ UP, bev_map),
        ground_features(ORIGIN, rays, UP, bev_map),
        atol=1e-3,
        rtol=1e-3,
    )


def test_a_pixel_of_a_point_gives_the_ray_to_it() -> None:
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=draw)).Q
    intrinsics = torch.tensor([[1200.0, 0.0, 800.0], [0.0, 1250.0, 450.0], [0.0, 0.0, 1.0]])
    camera = torch.cat([intrinsics, rotation, torch.tensor([[0.4], [1.5], [-0.3]])], dim=1)
    inside = torch.tensor([3.0, -1.0, 12.0])
    image = intrinsics @ inside
    origin, rays = camera_rays(camera, (image[:2] / image[2])[None])
    torch.testing.assert_close(origin + 12.0 * rays[0], rotation @ inside + camera[:, 6])


def test_a_network_with_fresh_rays_equals_the_one_without() -> None:
    plain, rays = network(), network(rays=2)
    rays.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.zeros_(rays.ray_embedder.mlp.fc2.weight)
    torch.nn.init.zeros_(rays.ray_embedder.mlp.fc2.bias)
    x, t = noisy(), torch.tensor([300.0])
    assert torch.equal(plain(x, t, conditions()), rays(x, t, conditions()))
    assert not network(fresh=True, rays=2).ray_embedder.mlp.fc2.weight.any()


def test_rays_change_the_velocity_and_dropped_conditions_hide_what_they_meet() -> None:
    net, given_now, x, t = network(rays=2), conditions(), noisy(), torch.tensor([300.0])
    other = replace(given_now, bev_map=~given_now.bev_map)
    features = net.ray_embedder.features(given_now, (3, 5, 8), (3, 4), net.tokens)
    assert features.shape == (1, 6, 3, 12, 4, 3 + 1 + 8 + 1 + 10 + 3)
    assert not net.ray_embedder.features(given_now.dropped(), (3, 5, 8), (3, 4), net.tokens).any()
    assert not torch.equal(net(x, t, given_now), net(x, t, other))


def test_the_order_of_gradients_is_found_for_a_network_with_rays() -> None:
    assert any(name.startswith("ray_embedder") for name in arrival_order(network(rays=2)))
