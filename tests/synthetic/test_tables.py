"""Generated tables and maps as nuscenes-devkit reads them."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from shapely.geometry import Point

from magicdrive_core.config.schema import Synth
from magicdrive_core.data.records import MAP_LAYERS
from magicdrive_core.synthetic.rig import SENSORS
from magicdrive_core.synthetic.traffic import SIZES, _touch, plan_scene


@pytest.fixture(scope="module")
def nusc(synthetic_root: Path) -> NuScenes:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return NuScenes("v1.0-demo", str(synthetic_root), verbose=False)


def _map(nusc: NuScenes, scene: dict) -> NuScenesMap:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return NuScenesMap(nusc.dataroot, nusc.get("log", scene["log_token"])["location"])


def _ego(nusc: NuScenes, sample: dict) -> dict:
    return nusc.get("ego_pose", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])


def test_all_eight_layers_reach_the_masks(nusc: NuScenes) -> None:
    for scene in nusc.scene:
        x, y, _ = _ego(nusc, nusc.get("sample", scene["first_sample_token"]))["translation"]
        masks = _map(nusc, scene).get_map_mask((x, y, 200, 200), 0.0, list(MAP_LAYERS), (400, 400))
        assert masks.any(axis=(1, 2)).all(), dict(zip(MAP_LAYERS, masks.sum(axis=(1, 2)), strict=True))


def test_the_ego_trajectory_is_on_lanes_and_on_the_mask(nusc: NuScenes) -> None:
    for scene in nusc.scene:
        nusc_map = _map(nusc, scene)
        mask = nusc.get("map", nusc.get("log", scene["log_token"])["map_token"])["mask"]
        for sample in nusc.sample:
            if sample["scene_token"] == scene["token"]:
                x, y, _ = _ego(nusc, sample)["translation"]
                on = nusc_map.layers_on_point(x, y)
                assert on["drivable_area"]
                assert on["lane"] or nusc_map.get_closest_lane(x, y, radius=1.0)
                assert mask.is_on_mask(np.array([x]), np.array([y])).all()


def test_arcline_paths_are_inside_their_lanes_and_connected(nusc: NuScenes) -> None:
    nusc_map = _map(nusc, nusc.scene[0])
    for layer in ("lane", "lane_connector"):
        for record in getattr(nusc_map, layer)[::7]:
            area = nusc_map.extract_polygon(record["polygon_token"]).buffer(0.3)
            points = np.array(nusc_map.discretize_lanes([record["token"]], 1.0)[record["token"]])
            assert all(area.contains(Point(x, y)) for x, y, _ in points)
            for following in nusc_map.get_outgoing_lane_ids(record["token"]):
                start = nusc_map.get_arcline_path(following)[0]["start_pose"]
                end = nusc_map.get_arcline_path(record["token"])[-1]["end_pose"]
                np.testing.assert_allclose(start[:2], end[:2], atol=1e-3)


def test_records_are_linked_in_order_at_the_rates_of_their_sensors(nusc: NuScenes) -> None:
    sample = nusc.sample[0]
    assert {sample["data"][sensor.channel] for sensor in SENSORS} <= {row["token"] for row in nusc.sample_data}
    for sensor in SENSORS:
        times = []
        name = sample["data"][sensor.channel]
        while name:
            row = nusc.get("sample_data", name)
            times.append(row["timestamp"])
            assert row["filename"].startswith("samples/" if row["is_key_frame"] else "sweeps/")
            assert (Path(nusc.dataroot) / row["filename"]).is_file()
            assert nusc.get("ego_pose", row["ego_pose_token"])["timestamp"] == row["timestamp"]
            name = row["next"]
        rate = 12 if sensor.is_camera else 20
        np.testing.assert_allclose(np.diff(times), 1e6 / rate, atol=1300)
        assert times[0] - sample["timestamp"] == sensor.delay
    for before, after in pairwise(nusc.sample[:4]):
        assert (before["next"], after["prev"]) == (after["token"], before["token"])


def test_every_scene_shows_all_ten_classes(nusc: NuScenes) -> None:
    for scene in nusc.scene:
        tokens = {row["token"] for row in nusc.sample if row["scene_token"] == scene["token"]}
        names = {row["category_name"] for row in nusc.sample_annotation if row["sample_token"] in tokens}
        assert names == set(SIZES)


def test_annotated_lidar_point_counts_match_the_lidar_files(nusc: NuScenes) -> None:
    sample = nusc.sample[1]
    path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
    points = LidarPointCloud.from_file(path).points[:3]
    assert points.shape[1] > 3000
    total = 0
    for box in boxes:
        counted = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
        # Boxes do not touch, so points within a thousandth of a box's size are returns from that box.
        assert int(points_in_box(box, points, wlh_factor=1.001).sum()) == counted
        total += counted
    assert total > 100


def test_visibility_follows_occlusion(nusc: NuScenes) -> None:
    levels = [row["visibility_token"] for row in nusc.sample_annotation]
    assert set(levels) == {"1", "2", "3", "4"}
    for row in nusc.sample_annotation:
        if row["visibility_token"] in "34":
            assert row["num_lidar_pts"] > 0


@pytest.mark.parametrize("index", range(3))
def test_no_two_actors_ever_touch(index: int) -> None:
    plan = plan_scene(Synth(seed=11, scenes=3, seconds=3.0), index)
    discs = plan.traffic._discs
    assert len(discs) > 30
    assert not any(_touch(discs[0], other) for other in discs[1:]), "something hits the ego"
    assert len({actor.category for actor in plan.traffic.actors}) == 10


def test_spread_drives_start_before_in_and_after_their_junction_and_stay_on_their_route() -> None:
    sizes = {"seed": 11, "scenes": 12, "seconds": 1.5}
    spread, plain = Synth(**sizes, starts="spread"), Synth(**sizes)
    plans = [plan_scene(spread, index) for index in range(12)]
    later = [plan.start - plan_scene(plain, plan.index).start for plan in plans]  # than just before the junction
    assert min(later) < -5
    assert max(later) > 5
    assert all(6 <= plan.start < plan.route.length - 1.5 * plan.speed for plan in plans)
