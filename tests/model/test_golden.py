"""Against the published system, to the digit: cases of the network, a training step, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from magicdrive_core.cli.main import main as cli
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow, restore_conditioning_frames
from magicdrive_core.diffusion.solvers import EulerSolver
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.guided_sampling import guided_velocity
from magicdrive_core.model.build import build_network
from magicdrive_core.model.published.golden import (
    channels_from_views,
    check_golden,
    golden_config,
    load_golden_network,
    read_conditions,
    read_npz,
    views_from_channels,
)
from magicdrive_core.model.published.transformer import published_null
from tests.conftest import PROJECT
from tests.golden.sets import COMPACT, read_arrays, settings

CASES = ["stage1_keep", "stage3_f1", "stage3_f17", "stage3_f17_xmask_drop", "stage3_pad4"]


@pytest.mark.parametrize("case", CASES)
def test_output_and_every_intermediate_agree(golden_set: Path, case: str) -> None:
    path = golden_set / f"golden_model_{case}.npz"
    result = check_golden(path)
    assert result.agrees
    arrays, _ = read_npz(path)
    for name, difference in result.rows:
        spread = float(arrays[name].abs().max())
        assert difference <= 2e-5 * max(1.0, spread), name


@pytest.mark.parametrize("named", [False, True])
def test_the_verb_checks_the_project_s_cases_and_what_a_shell_makes_of_a_pattern(
    named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``golden_model_*.npz`` names the weights too."""
    monkeypatch.chdir(PROJECT)
    with pytest.raises(SystemExit) as ended:
        cli(["golden", *(map(str, sorted(COMPACT.glob("golden_model_*.npz"))) if named else ())])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.split()[1] == "out"] == [f"golden_model_{c}.npz" for c in CASES]


def test_the_verb_says_what_to_do_where_no_cases_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli(["golden"])
    assert ended.value.code == 1
    assert "tests/golden holds no golden_model_*.npz" in capsys.readouterr().err


def test_a_wrong_weight_is_noticed(tmp_path: Path) -> None:
    """The check can fail: the same case with one bias moved by a thousandth."""
    case = "golden_model_stage3_f1.npz"
    (tmp_path / case).write_bytes((COMPACT / case).read_bytes())
    with np.load(COMPACT / "golden_model_stage3_weights.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["final_layer.linear.bias"] = arrays["final_layer.linear.bias"] + np.float32(1e-3)
    np.savez(tmp_path / "golden_model_stage3_weights.npz", **arrays)
    assert not check_golden(tmp_path / case).agrees


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match="not a golden model file"):
        check_golden(COMPACT / "golden_model_stage3_weights.npz")
    with pytest.raises(MagicDriveError, match="is missing"):
        check_golden(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(MagicDriveError, match="no golden file"):
        check_golden(tmp_path / "text.npz")


def tensors(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that the compact set holds packed; returns its arrays and settings."""
    arrays = read_arrays(COMPACT / name)
    meta = settings(arrays)
    return {key: torch.from_numpy(array) for key, array in arrays.items() if key != "__meta_json__"}, meta


def test_a_training_step_gives_the_published_loss_and_gradients() -> None:
    step, meta = tensors("golden_train_step.npz")
    case, case_meta = read_npz(COMPACT / meta["inputs_file"])
    network = load_golden_network(COMPACT / meta["inputs_file"], case_meta)
    conditions, x_mask = read_conditions(case), case["in/x_mask"]
    views = conditions.cameras.shape[1]
    x_0, noise = (views_from_channels(x, views) for x in (case["in/x"], step["in/noise"]))
    x_t = restore_conditioning_frames(RectifiedFlow.add_noise(x_0, noise, step["t"]), x_0, x_mask)
    loss = RectifiedFlow.loss(network(x_t, step["t"], conditions, x_mask), x_0, noise, x_mask)
    torch.testing.assert_close(loss, step["loss"], rtol=1e-5, atol=1e-5)
    loss.mean().backward()
    # The published rotary tables are cached half way through their own first use (oddity 6); here they are constants.
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(gradients) == len(list(network.parameters())) - 3
    compared = 0
    for key, expected in step.items():
        kind, _, name = key.partition("/")
        if name not in gradients:
            assert not kind.startswith("grad") or name.endswith("rope.freqs")
        elif kind == "grad_l2":
            assert float(gradients[name].norm()) == pytest.approx(float(expected), rel=2e-5, abs=1e-7), name
        elif kind == "grad":
            torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        compared += name in gradients
    assert compared == len(gradients) + 10


@pytest.mark.parametrize(("variant", "zero_map"), [("rflow", False), ("rflow_map0", True), ("rflow_slice", True)])
def test_guided_sampling_equals_the_published_one(variant: str, zero_map: bool) -> None:
    arrays, meta = tensors("golden_sample_tiny.npz")
    weights, weights_meta = read_npz(COMPACT / meta["weights_file"])
    network = build_network(golden_config(weights_meta)).eval()
    network.load_state_dict(weights)
    case, _ = read_npz(COMPACT / "golden_model_stage3_f17.npz")  # has the same conditions, with some frames dropped
    conditions = read_conditions({name: array for name, array in case.items() if "/drop_" not in name})
    z = views_from_channels(arrays["in/z"], conditions.cameras.shape[1])
    with torch.no_grad():
        null = published_null(network, conditions, zero_map=zero_map)
        velocity = guided_velocity(network, conditions, null, tuple(z.shape[3:]), meta["cfg_scale"])
        out = EulerSolver(RectifiedFlow().timesteps(meta["steps"], (17, 48, 80))).sample(velocity, z)
    # Guidance doubles the two passes' own tolerance of 5e-5.
    torch.testing.assert_close(channels_from_views(out), arrays[f"{variant}/z_final"], rtol=0, atol=1e-4)
