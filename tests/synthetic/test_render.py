"""Rendered pictures: exact geometry, equal bytes on every machine, and all pictures that tables name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry import poses
from magicdrive_core.geometry.cameras import project
from magicdrive_core.synthetic.camera import SHIFT, PosedCamera
from magicdrive_core.synthetic.footage import read_footage
from magicdrive_core.synthetic.ground import MapLayers, read_layers
from magicdrive_core.synthetic.light import DAY, NIGHT, RAIN, light_of
from magicdrive_core.synthetic.render import draw, prepare_process, prepare_world, render_missing
from magicdrive_core.synthetic.rig import SENSORS
from magicdrive_core.synthetic.scenery import place_scenery
from magicdrive_core.synthetic.solids import Solids, faces_of, far_to_near, fill

CAMERAS = [sensor for sensor in SENSORS if sensor.is_camera]
NO_LAMPS = np.empty((0, 2))


def _camera(index: int = 0, ego: np.ndarray | None = None) -> PosedCamera:
    sensor = CAMERAS[index]
    ego = np.eye(4) if ego is None else ego
    return PosedCamera(np.array(sensor.intrinsic), ego @ poses.pose(sensor.rotation, sensor.translation), ego)


def _solid(name: str, centre: tuple[float, float, float], size: tuple[float, float, float], yaw: float) -> Solids:
    rotation = poses.rotation_matrix([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
    return Solids([name], np.array([centre]), np.array([size]), rotation[None], np.ones(1), np.zeros(1, np.int64))


def _painted(solids: Solids, camera: PosedCamera) -> np.ndarray:
    picture = np.zeros((900, 1600, 3), np.uint8)
    fill(picture, faces_of(solids, camera, DAY, NO_LAMPS), camera)
    return (picture.max(axis=2) > 60).astype(np.uint8)  # edges are anti-aliased: count pixels that are half covered


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("yaw", [0.2, 1.9])
def test_a_box_covers_its_projected_hull_to_a_pixel(index: int, yaw: float) -> None:
    camera = _camera(index)
    ahead = camera.camera_to_global[:3, 2] * 12 + camera.eye
    size = (2.4, 1.1, 1.6)  # w, l, h
    solids = _solid("barrier", (float(ahead[0]), float(ahead[1]), 0.8), size, yaw)
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(-1, 3) / 2
    corners = (signs * [size[1], size[0], size[2]]) @ solids.rotations[0].T + solids.centres[0]
    pixels, depth = project(poses.transform(poses.inverse(camera.camera_to_global), corners), camera.intrinsics)
    assert (depth > 1).all()
    hull = cv2.convexHull(pixels.astype(np.float32))[:, 0]
    painted = _painted(solids, camera)
    centres = np.argwhere(painted)[:, ::-1] + 0.5
    inside = np.array([cv2.pointPolygonTest(hull, (float(x), float(y)), True) for x, y in centres[::17]])
    assert inside.min() > -1.0
    filled = np.zeros_like(painted)
    cv2.fillConvexPoly(filled, np.round((hull - 0.5) * 16).astype(np.int32), (1,), shift=SHIFT)
    missing = cv2.erode(filled, np.ones((3, 3), np.uint8)) & (1 - painted)
    assert not missing.any()


def test_a_ground_polygon_is_clipped_exactly_at_the_near_plane() -> None:
    camera = _camera()
    strip = np.array([[-30.0, -2], [60, -2], [60, 2], [-30, 2]])  # passes under and behind the camera
    labels = np.zeros((900, 1600), np.uint8)
    cv2.fillPoly(labels, [camera.outline(camera.from_ground(strip))], (1,), shift=SHIFT)
    rows, columns = np.mgrid[520:900:13, 5:1600:29]
    ray = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)], axis=-1) @ np.linalg.inv(camera.intrinsics).T
    ray = ray @ camera.camera_to_global[:3, :3].T
    point = camera.eye + ray * (-camera.eye[2] / ray[..., 2])[..., None]
    clear = np.abs(np.abs(point[..., 1]) - 2) > 0.004 * np.linalg.norm(point, axis=-1)  # not within about 4 pixels
    truth = (np.abs(point[..., 1]) < 2) & (point[..., 0] < 60)
    assert (labels[rows, columns] == truth)[clear].all()
    assert truth.any()


def test_a_solid_behind_the_camera_is_not_drawn() -> None:
    assert not _painted(_solid("bus", (-20.0, 0.0, 1.7), (2.9, 11.0, 3.5), 0.3), _camera()).any()


def test_a_person_in_front_of_a_long_bus_is_drawn_over_it() -> None:
    bus = _solid("bus", (16.0, 0.0, 1.75), (2.9, 11.0, 3.5), 0.0)
    person = _solid("pedestrian", (17.0, 2.3, 0.9), (0.7, 0.7, 1.8), 0.0)  # beside the bus, farther than its centre
    eye = np.array([5.0, 9.0])
    for solids, nearest in ((bus.joined(person), 1), (person.joined(bus), 0)):
        assert far_to_near(solids, eye)[-1] == nearest
        assert far_to_near(solids, -eye)[-1] == 1 - nearest


def test_map_markings_are_drawn_at_their_map_positions() -> None:
    square = np.array([[10.0, -3], [14, -3], [14, 3], [10, 3]])
    empty: list = []
    names = ("drivable_area", "ped_crossing", "walkway", "stop_line", "carpark_area", "road_block")
    layers = MapLayers(dict.fromkeys(names, empty), {"road_divider": [], "lane_divider": []})
    with_line = MapLayers({**layers.polygons, "stop_line": [[square]]}, layers.lines)
    no_solids = Solids([], *np.empty((2, 0, 3)), np.empty((0, 3, 3)), np.empty(0), np.empty(0, np.int64))
    camera = _camera()
    plain, marked = (draw(camera, DAY, prepare_world(s, place_scenery(s)), no_solids) for s in (layers, with_line))
    changed = (plain != marked).any(axis=2).astype(np.uint8)
    truth = np.zeros_like(changed)
    cv2.fillPoly(truth, [camera.outline(camera.from_ground(square))], (1,), shift=SHIFT)
    assert (changed == truth).all()
    assert truth.sum() > 1000


def test_light_is_chosen_by_whole_words_of_the_description() -> None:
    assert light_of("Night, rain, wet road") is NIGHT
    assert light_of("Rain, parked cars") is RAIN
    assert light_of("Train crossing, trailer, terrain, knight") is DAY


def test_a_rainy_picture_has_its_known_digest(synthetic_root: Path) -> None:
    """Wet roads; the digest of the manifest covers tables and pictures by day and night."""
    scene = read_footage(synthetic_root, "v1.0-demo")[0]
    shot = scene.shots[12]
    prepare_process()
    layers = read_layers(synthetic_root, scene.location)
    picture = draw(shot.camera, RAIN, prepare_world(layers, place_scenery(layers)), scene.solids_at(shot.timestamp))
    assert hashlib.sha256(picture.tobytes()).hexdigest() == RAINY, "raise CITY_VERSION if the picture should change"


RAINY = "f4146d787536b413873af1ebc9b000f12034b5812464210560aec17b854aeeba"


def test_missing_pictures_of_a_real_drive_are_rendered(shared: Path, tmp_path: Path) -> None:
    root, version = tmp_path / "drive", "v1.0-drive"
    shutil.copytree(shared / "data" / "nuscenes-drive", root, copy_function=shutil.copyfile)
    table = root / version / "sample_data.json"
    root.chmod(0o755)
    (root / version).chmod(0o755)
    rows = [row for row in json.loads(table.read_text()) if row["fileformat"] == "jpg"]
    wanted = rows[10::150]
    table.write_text(json.dumps(wanted))
    assert render_missing(root, version, workers=1) == len(wanted) > 5
    assert render_missing(root, version, workers=1) == 0
    pictures = [cv2.imread(str(root / row["filename"])) for row in wanted]
    assert all(picture.shape == (900, 1600, 3) and picture.std() > 20 for picture in pictures)


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"v1\.0-none is missing.*synth"):
        render_missing(tmp_path, "v1.0-none")
    (tmp_path / "v1.0-half").mkdir()
    with pytest.raises(MagicDriveError, match=r"\.json is missing"):
        render_missing(tmp_path, "v1.0-half")
