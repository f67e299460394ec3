"""The second town: other streets, colours and cars in the same form; the first town stays as it was (test_dataset)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magicdrive_core.config.schema import Synth
from magicdrive_core.synthetic.city import LAYOUTS, TOWNS, city
from magicdrive_core.synthetic.dataset import synthesize
from magicdrive_core.synthetic.light import DAY, light_of
from magicdrive_core.synthetic.traffic import SIZES, plan_scene
from magicdrive_core.utils.files import read_json

SECOND = Synth(seed=3, scenes=1, seconds=0.1, town="second")


def test_streets_have_other_widths() -> None:
    first, second = (city(TOWNS[town][0]) for town in ("first", "second"))
    assert first.size != second.size
    for streets in (first, second):
        walkway = streets.areas["walkway"][0]
        assert len(walkway.rings) == 2
        assert streets.layout == LAYOUTS[streets.location]
    lanes = [next(iter(streets.lanes.values())).curve.length for streets in (first, second)]
    assert lanes[1] > lanes[0]


@pytest.mark.parametrize("index", range(4))
def test_every_kind_of_drive_finds_a_route_and_cars_are_smaller(index: int) -> None:
    plan = plan_scene(Synth(seed=1, scenes=4, seconds=2.0, town="second"), index)
    assert plan.location in TOWNS["second"]
    cars = [actor for actor in plan.traffic.actors if actor.category == "vehicle.car"]
    assert cars
    assert all(actor.size[1] == pytest.approx(0.88 * SIZES["vehicle.car"][1]) for actor in cars)


def test_its_data_has_the_same_form_and_other_colours(tmp_path: Path) -> None:
    synthesize(SECOND, tmp_path / "data", "v1.0-tiny", workers=1)
    (log,) = read_json(tmp_path / "data/v1.0-tiny/log.json")
    assert log["location"] in TOWNS["second"]
    assert (tmp_path / f"data/maps/expansion/{log['location']}.json").is_file()
    picture = np.asarray(Image.open(next((tmp_path / "data/samples/CAM_FRONT").iterdir())))
    red, _, blue = picture[600:].mean(axis=(0, 1))
    assert red > blue + 5  # its roads are brown; those of the first town are grey
    assert light_of("drive", TOWNS["second"][0]) != DAY
    assert light_of("drive", TOWNS["first"][0]) is DAY
