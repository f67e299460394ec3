"""The measure of control: high where pictures show what is true, low where they show something else."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from magicdrive_core.data.pictures import read_picture
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.region_classifier import Frame, RegionClassifier
from magicdrive_core.evaluation.region_fidelity import measure_fidelity
from magicdrive_core.geometry.cameras import Framing, project
from magicdrive_core.geometry.poses import inverse, transform
from magicdrive_core.synthetic.footage import read_footage
from magicdrive_core.synthetic.light import DAY, light_of
from magicdrive_core.synthetic.regions import Region, RegionPainter

FRAMING = Framing(80, 144)


@pytest.fixture(scope="module")
def painter(synthetic_root: Path) -> RegionPainter:
    return RegionPainter(synthetic_root, "v1.0-demo")


@pytest.fixture(scope="module")
def by_day(synthetic_root: Path, painter: RegionPainter) -> list[list[Frame]]:
    """Six frames a moment of the scene by day: four moments to learn from, one between them to judge."""
    footage = next(f for f in read_footage(synthetic_root, "v1.0-demo") if light_of(f.description) == DAY)
    shots = sorted(footage.shots, key=lambda shot: shot.timestamp)
    # Two moments that follow each other are learnt by heart, and half of the road is not found elsewhere.
    learnt = [shot for index, shot in enumerate(shots[::-1]) if index // 6 % 4 == 0][:24]
    return [
        [
            Frame(DAY, read_picture(synthetic_root / s.filename, FRAMING), painter.of_frame(s.filename, FRAMING))
            for s in moment
        ]
        for moment in (learnt, shots[-12:-6])
    ]


@pytest.fixture(scope="module")
def classifier(by_day: list[list[Frame]]) -> RegionClassifier:
    return RegionClassifier.learn(by_day[0])


def test_exact_pictures_score_high(classifier: RegionClassifier, by_day: list[list[Frame]]) -> None:
    found = measure_fidelity(classifier, [frame.picture for frame in by_day[1]], by_day[1])
    for region in (Region.SKY, Region.ROAD, Region.SCENERY):
        assert found.iou[region] > 0.8, region
    assert found.iou[Region.VEHICLE] > 0.5
    assert found.contrast[Region.VEHICLE] > 0.5
    assert found.contrast[Region.MARK] > 0.25
    assert found.psnr == float("inf")


def test_pictures_of_other_places_score_low(classifier: RegionClassifier, by_day: list[list[Frame]]) -> None:
    judged = by_day[1]
    own = measure_fidelity(classifier, [frame.picture for frame in judged], judged)
    other = measure_fidelity(classifier, [frame.picture for frame in judged[1:] + judged[:1]], judged)
    for region in (Region.ROAD, Region.VEHICLE, Region.SCENERY):
        assert other.iou[region] < 0.75 * own.iou[region], region
    for region in (Region.MARK, Region.VEHICLE):
        assert other.contrast[region] < 0.3 * own.contrast[region], region
    assert other.psnr < 20


def test_a_picture_without_vehicles_has_none(classifier: RegionClassifier, by_day: list[list[Frame]]) -> None:
    asphalt = [np.full_like(frame.picture, (98, 99, 103)) for frame in by_day[1]]
    found = measure_fidelity(classifier, asphalt, by_day[1])
    assert found.iou[Region.VEHICLE] < 0.02
    assert abs(found.contrast[Region.VEHICLE]) < 0.02


def test_where_a_pixel_lies_does_not_enter(classifier: RegionClassifier, by_day: list[list[Frame]]) -> None:
    """A picture of another place, cut out of a larger one: beyond the reach of its edges, nothing changes."""
    picture = np.tile(by_day[1][0].picture, (2, 1, 1))
    np.testing.assert_allclose(
        classifier.shares(DAY, picture[13:])[40:80], classifier.shares(DAY, picture)[53:93], atol=1e-5
    )


def test_another_size_is_refused(classifier: RegionClassifier, by_day: list[list[Frame]]) -> None:
    frame = by_day[1][0]
    with pytest.raises(ValueError, match="its truth"):
        measure_fidelity(classifier, [frame.picture[:-8]], [frame])


def test_vehicles_lie_within_their_projected_boxes(synthetic_root: Path, painter: RegionPainter) -> None:
    """The regions against geometry that the drawing does not use: corners of the annotated boxes, projected."""
    vehicles = {"car", "truck", "bus", "trailer", "construction_vehicle"}
    seen = 0
    for footage in read_footage(synthetic_root, "v1.0-demo"):
        for shot in sorted(footage.shots, key=lambda shot: shot.timestamp)[:6]:
            solids = footage.solids_at(shot.timestamp)
            signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(-1, 3) / 2
            hulls = np.zeros((900, 1600), np.uint8)
            for index in (i for i, name in enumerate(solids.names) if name in vehicles):
                corners = (signs * solids.sizes[index][[1, 0, 2]]) @ solids.rotations[index].T + solids.centres[index]
                pixels, depth = project(transform(inverse(shot.camera.camera_to_global), corners), shot.intrinsics)
                if (depth > 0.5).all():
                    cv2.fillConvexPoly(hulls, cv2.convexHull(np.rint(pixels).astype(np.int32)), (1,))
                elif (depth > 0).any():
                    hulls[:] = 1  # reaches behind the camera: nothing is claimed
            found = painter.of_frame(shot.filename, Framing(900, 1600)) == Region.VEHICLE
            outside = found & (cv2.dilate(hulls, np.ones((5, 5), np.uint8)) == 0)
            assert not outside.any()
            seen += int(found.sum())
    assert seen > 10_000


def test_an_unknown_picture_is_named(painter: RegionPainter) -> None:
    with pytest.raises(MagicDriveError, match=r"nowhere\.jpg"):
        painter.of_frame("nowhere.jpg", FRAMING)
