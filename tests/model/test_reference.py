"""``magicdrive golden`` on files of other networks: nothing is fitted to the settings of the recorded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from magicdrive_core.cli.main import main as cli
from magicdrive_core.model.build import build_network
from magicdrive_core.model.published.golden import TOLERANCE, check_golden, golden_config, read_npz
from tests.golden.sets import COMPACT
from tests.model.reference import Reference

RING4 = {"0": [3, 1], "1": [0, 2], "2": [1, 3], "3": [2, 0]}
LINE3 = {"0": [1], "1": [2], "2": [0]}  # one neighbour a view

CASES: dict[str, dict[str, Any]] = {
    "more views, uneven latents, conditioning frames, samples dropped": {
        "order": RING4, "batch": 3, "frames": 9, "size": (7, 9), "conditioning_frames": True, "dropped": True,
    },
    "one neighbour, no text mask, height padding": {
        "order": LINE3, "frames": 8, "size": (6, 10), "text_mask": False, "pad": 8,
    },
    "single frames without temporal blocks": {"order": RING4, "frames": 1, "stage1": True, "size": (4, 6)},
    "means over several frames": {"order": LINE3, "frames": 5, "latents": 3, "stage1": True, "size": (5, 6)},
    "no temporal blocks in the control branch": {
        "order": LINE3, "frames": 17, "size": (4, 4), "control_skip_temporal": True, "map": (30, 20), "layers": 5,
    },
}  # fmt: skip


def settings(case: dict[str, Any]) -> dict[str, Any]:
    stage1 = case.get("stage1", False)
    reduction = {} if stage1 else {"time_downsample_factor": 4.5}
    return {
        "hidden_size": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "in_channels": 5, "caption_channels": 14,
        "model_max_length": 9, "with_temp_block": not stage1, "control_depth": 1,
        "control_skip_temporal": case.get("control_skip_temporal", stage1),
        "bbox_embedder_param": {
            "n_classes": 6, "class_token_dim": 20, "sample_id": not stage1, "num_heads": 4,
            "proj_dims": [18, 22, 26, 30, 48], **reduction,
        },
        "frame_emb_param": {"num_heads": 2, **reduction},
        "map_embedder_param": {
            "conditioning_size": [case.get("layers", 8), *case.get("map", (24, 32))], "block_out_channels": [3, 5, 7],
        },
    }  # fmt: skip


def inputs(case: dict[str, Any], config: dict[str, Any]) -> dict[str, Tensor]:
    V, B, F, N = len(case["order"]), case.get("batch", 2), case["frames"], 3
    T = case.get("latents", max(1, F // 4 + F % 2))
    L, D = config["model_max_length"], config["caption_channels"]
    arrays = {
        "in/x": torch.randn(B, config["in_channels"] * V, T, *case["size"]),
        "in/timestep": 1000 * torch.rand(B),
        "in/y": torch.randn(B, 1, L, D),
        "in/maps": torch.randint(0, 2, (B, F, *config["map_embedder_param"]["conditioning_size"])).float(),
        "in/bbox_bboxes": 5 * torch.randn(B, 1, F, N, 8, 3).expand(-1, V, -1, -1, -1, -1).flatten(0, 1),
        "in/bbox_classes": torch.randint(-1, 6, (B, 1, F, N)).expand(-1, V, -1, -1).flatten(0, 1),
        "in/bbox_masks": torch.randint(-1, 2, (B * V, F, N)),
        "in/cams": 3 * torch.randn(B * V, F, 1, 3, 7),
        "in/rel_pos": torch.randn(B, 1, F, 1, 4, 4).expand(-1, V, -1, -1, -1, -1).flatten(0, 1),
        "in/fps": torch.full((B,), 120.0 if F == 1 else 12.0),
        "in/height": torch.full((B,), 8.0 * case["size"][0]),
        "in/width": torch.full((B,), 8.0 * case["size"][1]),
    }
    if case.get("text_mask", True):
        arrays["in/mask"] = (torch.arange(L)[None] < torch.randint(1, L - 2, (B, 1))).long()
    if not case.get("stage1"):
        latent = torch.randn(B, 1, 1, N, config["bbox_embedder_param"]["class_token_dim"])
        arrays["in/bbox_box_latent"] = latent.expand(-1, V, F, -1, -1).flatten(0, 1)
    if case.get("conditioning_frames"):
        arrays["in/x_mask"] = torch.rand(B, T) > 0.4
    if case.get("dropped"):
        arrays["in/drop_cond_mask"] = torch.tensor([1.0, 0.0, 1.0])
        arrays["in/drop_frame_mask"] = (torch.rand(B, F) > 0.3).float()
    return arrays


def save(path: Path, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
    encoded = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(path, __meta_json__=encoded, **{name: array.numpy() for name, array in arrays.items()})


def write_case(folder: Path, case: dict[str, Any]) -> Path:
    """A case and its weights in the form of the recorded ones, with the output of the plain formulas."""
    torch.manual_seed(3)
    config = settings(case)
    meta = {"config": config, "mv_order_map": case["order"], "force_pad_h_for_sp_size": case.get("pad")}
    network = build_network(golden_config(meta))
    for name, parameter in network.named_parameters():  # nothing is left at zero
        if not name.endswith("rope.freqs"):
            nn.init.normal_(parameter, std=1 / max(8, parameter[0].numel()) ** 0.5)
    weights = network.state_dict()
    save(folder / "weights.npz", weights, {"config": config})
    arrays = inputs(case, config)
    out = Reference(weights, meta)(arrays)
    save(folder / "case.npz", {**arrays, "out": out}, {**meta, "weights_file": "weights.npz"})
    return folder / "case.npz"


@torch.no_grad()
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_networks_agree_with_the_formulas(tmp_path: Path, case: dict[str, Any]) -> None:
    result = check_golden(write_case(tmp_path, case))
    assert result.agrees, result.rows


@torch.no_grad()
@pytest.mark.parametrize("case", ["stage1_keep", "stage3_f17_xmask_drop", "stage3_pad4"])
def test_the_formulas_agree_with_the_published_system(case: str) -> None:
    """So that agreement with them means something."""
    path = COMPACT / f"golden_model_{case}.npz"
    arrays, meta = read_npz(path)
    weights, _ = read_npz(path.parent / meta["weights_file"])
    out = Reference(weights, meta)(arrays)
    torch.testing.assert_close(out, arrays["out"], rtol=0, atol=TOLERANCE)


def test_the_verb_prints_every_row_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        path = write_case(tmp_path, CASES["single frames without temporal blocks"])
    arrays, meta = read_npz(path)
    network = build_network(golden_config(meta))
    network.load_state_dict(read_npz(tmp_path / "weights.npz")[0])
    fps = network.fps_embedder(arrays["in/fps"]).detach()
    wrong = {**arrays, "mid/fps_embedder": fps + 1, "mid/nonsense": fps, "out": arrays["out"] + 1e-3}
    save(tmp_path / "wrong.npz", wrong, meta)
    codes = []
    for names in (["case.npz"], ["case.npz", "wrong.npz"]):
        with pytest.raises(SystemExit) as ended:
            cli(["golden", *(str(tmp_path / name) for name in names)])
        codes.append(ended.value.code)
    assert codes == [0, 1]
    out, err = capsys.readouterr()
    rows = {tuple(line.split()[:2]): line.split()[2] for line in out.splitlines()}
    assert float(rows["wrong.npz", "mid/fps_embedder"]) == pytest.approx(1)
    assert rows["wrong.npz", "mid/nonsense"] == "nan"
    assert float(rows["case.npz", "out"]) <= TOLERANCE < float(rows["wrong.npz", "out"])
    assert "wrong.npz" in err
    assert "case.npz," not in err
