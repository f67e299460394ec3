"""The figures of ``magicdrive fidelity``: what the file, MLflow and the terminal get, and what is refused first."""

from __future__ import annotations

import json
import re

import pytest

from magicdrive_core.config.load import load_config
from magicdrive_core.errors import UsageError
from magicdrive_core.evaluation import fidelity_run
from magicdrive_core.evaluation.consistency import Agreement
from magicdrive_core.evaluation.control_fidelity import GENERATED, RECONSTRUCTED, RENDERED, UNTRAINED, Comparison
from magicdrive_core.evaluation.edit_response import MOVED, Response
from magicdrive_core.evaluation.region_fidelity import Fidelity
from magicdrive_core.synthetic.regions import Region
from tests.conftest import PROJECT

NAN = float("nan")
LEARN = PROJECT / "profiles/learn.yaml"


def comparison() -> Comparison:
    """A network at half of the VAE's limit, on single frames."""
    half = {RENDERED: 0.9, RECONSTRUCTED: 0.8, GENERATED: 0.4, UNTRAINED: 0.0}
    regions = {
        label: Fidelity(
            {region: NAN if region == Region.SMALL else iou for region in Region},
            {Region.MARK: iou, Region.VEHICLE: iou},
            float("inf") if label == RENDERED else 20.0,
        )
        for label, iou in half.items()
    }
    views = {label: Agreement(2.0 if label == RENDERED else 3.0, 0.5, 100) for label in half}
    return Comparison(regions, {label: Agreement(NAN, NAN, 0) for label in half}, views)


RESPONSES = {MOVED: Response(2, -0.2, 0.1, -0.5, 0.5)}


def test_figures_fit_in_json_and_say_shares_ratios_and_responses() -> None:
    control = type("Control", (), {"scenes": [], "measured_frames": None})()
    values = fidelity_run._finite(fidelity_run._figures(comparison(), RESPONSES, control))
    read = json.loads(json.dumps(values, allow_nan=False))
    assert read["shares"]["road"] == 0.5
    assert read["shares"]["small"] is None
    assert read["regions"][RENDERED]["psnr"] is None
    assert read["consistency"][GENERATED] == {
        "time_error": None, "time_ratio": None, "time_structure": None,
        "views_error": 3.0, "views_ratio": 1.5, "views_structure": 0.5,
    }  # fmt: skip
    assert read["edits"][MOVED]["share"] == pytest.approx(0.3)


def test_names_of_metrics_suit_mlflow() -> None:
    metrics = fidelity_run._metrics(comparison(), RESPONSES)
    assert all(re.fullmatch(r"[\w/ .-]+", name) for name in metrics)
    assert metrics["fidelity/road_share"] == 0.5
    assert metrics["fidelity/views_ratio"] == 1.5
    assert metrics["fidelity/moved_car_response"] == pytest.approx(0.3)


def test_the_terminal_gets_three_tables() -> None:
    lines = fidelity_run._tables(comparison(), RESPONSES)
    assert lines.count("") == 2
    assert [line.split()[0] for line in lines if line.startswith((GENERATED, "share of", MOVED))] == [
        GENERATED, "share", GENERATED, "moved",
    ]  # fmt: skip
    assert fidelity_run._tables(comparison(), {}).count("") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synth=null", "synth is null"),
        ("generate.edits=rain.yaml", "generate.edits is set"),
        ("generate.initial_frames=real", "generate.initial_frames is set"),
    ],
)
def test_what_has_no_exact_truth_is_refused_before_any_work(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fidelity_run.measure_fidelity(load_config(LEARN, [override]))
