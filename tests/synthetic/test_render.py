"""Drawing: exact where geometry is meant, complete where tables ask for pictures."""

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
from magicdrive_core.synthetic.footage import read_footage
from magicdrive_core.synthetic.ground import MapShapes, read_shapes
from magicdrive_core.synthetic.lens import SHIFT, Lens
from magicdrive_core.synthetic.light import DAY, NIGHT, RAIN, light_of
from magicdrive_core.synthetic.render import draw, prepare_place, prepare_process, render_missing
from magicdrive_core.synthetic.rig import SENSORS
from magicdrive_core.synthetic.scenery import furnish
from magicdrive_core.synthetic.solids import Things, faces_of, far_to_near, fill

CAMERAS = [sensor for sensor in SENSORS if sensor.is_camera]
NO_LAMPS = np.empty((0, 2))


def _lens(camera: int = 0, ego: np.ndarray | None = None) -> Lens:
    sensor = CAMERAS[camera]
    ego = np.eye(4) if ego is None else ego
    return Lens(np.array(sensor.intrinsic), ego @ poses.pose(sensor.rotation, sensor.translation), ego)


def _thing(name: str, centre: tuple[float, float, float], size: tuple[float, float, float], yaw: float) -> Things:
    rotation = poses.rotation_matrix([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
    return Things([name], np.array([centre]), np.array([size]), rotation[None], np.ones(1))


def _painted(things: Things, lens: Lens) -> np.ndarray:
    picture = np.zeros((900, 1600, 3), np.uint8)
    fill(picture, faces_of(things, lens, DAY, NO_LAMPS), lens)
    return (picture.max(axis=2) > 60).astype(np.uint8)  # edges are smooth: pixels that are covered by half


@pytest.mark.parametrize("camera", range(6))
@pytest.mark.parametrize("yaw", [0.2, 1.9])
def test_a_box_covers_its_projected_hull_to_a_pixel(camera: int, yaw: float) -> None:
    lens = _lens(camera)
    ahead = lens.camera_to_global[:3, 2] * 12 + lens.eye
    size = (2.4, 1.1, 1.6)  # w, l, h
    things = _thing("barrier", (float(ahead[0]), float(ahead[1]), 0.8), size, yaw)
    signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(-1, 3) / 2
    corners = (signs * [size[1], size[0], size[2]]) @ things.rotations[0].T + things.centres[0]
    pixels, depth = project(poses.transform(poses.inverse(lens.camera_to_global), corners), lens.intrinsics)
    assert (depth > 1).all()
    hull = cv2.convexHull(pixels.astype(np.float32))[:, 0]
    painted = _painted(things, lens)
    centres = np.argwhere(painted)[:, ::-1] + 0.5
    inside = np.array([cv2.pointPolygonTest(hull, (float(x), float(y)), True) for x, y in centres[::17]])
    assert inside.min() > -1.0
    filled = np.zeros_like(painted)
    cv2.fillConvexPoly(filled, np.round((hull - 0.5) * 16).astype(np.int32), (1,), shift=SHIFT)
    missing = cv2.erode(filled, np.ones((3, 3), np.uint8)) & (1 - painted)
    assert not missing.any()


def test_a_ground_polygon_through_the_near_plane_is_cut_exactly() -> None:
    lens = _lens()
    strip = np.array([[-30.0, -2], [60, -2], [60, 2], [-30, 2]])  # passes under and behind the camera
    labels = np.zeros((900, 1600), np.uint8)
    cv2.fillPoly(labels, [lens.outline(lens.ground(strip))], (1,), shift=SHIFT)
    rows, columns = np.mgrid[520:900:13, 5:1600:29]
    ray = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)], axis=-1) @ np.linalg.inv(lens.intrinsics).T
    ray = ray @ lens.camera_to_global[:3, :3].T
    place = lens.eye + ray * (-lens.eye[2] / ray[..., 2])[..., None]
    clear = np.abs(np.abs(place[..., 1]) - 2) > 0.004 * np.linalg.norm(place, axis=-1)  # not within about 4 pixels
    truth = (np.abs(place[..., 1]) < 2) & (place[..., 0] < 60)
    assert (labels[rows, columns] == truth)[clear].all()
    assert truth.any()


def test_what_is_behind_the_camera_is_not_drawn() -> None:
    assert not _painted(_thing("bus", (-20.0, 0.0, 1.7), (2.9, 11.0, 3.5), 0.3), _lens()).any()


def test_a_long_bus_does_not_cover_who_stands_before_it() -> None:
    bus = _thing("bus", (16.0, 0.0, 1.75), (2.9, 11.0, 3.5), 0.0)
    person = _thing("pedestrian", (17.0, 2.3, 0.9), (0.7, 0.7, 1.8), 0.0)  # farther than the bus's middle, beside it
    eye = np.array([5.0, 9.0])
    for things, nearest in ((bus.joined(person), 1), (person.joined(bus), 0)):
        assert far_to_near(things, eye)[-1] == nearest
        assert far_to_near(things, -eye)[-1] == 1 - nearest


def test_markings_of_the_map_are_where_the_map_has_them() -> None:
    square = np.array([[10.0, -3], [14, -3], [14, 3], [10, 3]])
    empty: list = []
    layers = ("drivable_area", "ped_crossing", "walkway", "stop_line", "carpark_area", "road_block")
    shapes = MapShapes(dict.fromkeys(layers, empty), {"road_divider": [], "lane_divider": []})
    with_line = MapShapes({**shapes.polygons, "stop_line": [[square]]}, shapes.lines)
    nobody = Things([], np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3, 3)), np.empty(0))
    lens = _lens()
    plain, marked = (draw(lens, DAY, prepare_place(s, furnish(s)), nobody) for s in (shapes, with_line))
    changed = (plain != marked).any(axis=2).astype(np.uint8)
    truth = np.zeros_like(changed)
    cv2.fillPoly(truth, [lens.outline(lens.ground(square))], (1,), shift=SHIFT)
    assert (changed == truth).all()
    assert truth.sum() > 1000


def test_light_is_read_in_whole_words() -> None:
    assert light_of("Night, rain, wet road") is NIGHT
    assert light_of("Rain, parked cars") is RAIN
    assert light_of("Train crossing, trailer, terrain, knight") is DAY


def test_a_rainy_picture_has_the_same_pixels_everywhere(synthetic_root: Path) -> None:
    """Tables and day and night pictures are pinned by the manifest's digest; this pins the wet road."""
    scene = read_footage(synthetic_root, "v1.0-demo")[0]
    shot = scene.shots[12]
    prepare_process()
    shapes = read_shapes(synthetic_root, scene.location)
    picture = draw(shot.lens, RAIN, prepare_place(shapes, furnish(shapes)), scene.things(shot.timestamp))
    assert hashlib.sha256(picture.tobytes()).hexdigest() == RAINY, "raise CITY_VERSION if the picture should change"


RAINY = "f4146d787536b413873af1ebc9b000f12034b5812464210560aec17b854aeeba"


def test_missing_pictures_of_a_real_drive_are_drawn(shared: Path, tmp_path: Path) -> None:
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


def test_tables_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"v1\.0-none is missing.*synth"):
        render_missing(tmp_path, "v1.0-none")
    (tmp_path / "v1.0-half").mkdir()
    with pytest.raises(MagicDriveError, match=r"\.json is missing"):
        render_missing(tmp_path, "v1.0-half")
