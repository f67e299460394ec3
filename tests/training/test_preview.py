"""Previews: which clips they show, and how one sheet holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from magicdrive_core.config.load import load_config
from magicdrive_core.training import preview
from magicdrive_core.training.preview import Preview
from tests.training.scenes import FakeText, make_scene
from tests.training.tiny_rank import NeverStop

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
SCENES = [make_scene("train", 30), *(make_scene(f"val{index}", 20, "val") for index in range(5))]


def made(monkeypatch: pytest.MonkeyPatch, scenes: list[Any], *overrides: str) -> Preview | None:
    for name, fake in {
        "read_scenes": lambda _: scenes,
        "BevMaps": lambda *_: mock.Mock(of_clip=lambda _scene, clip, _size: np.zeros((clip.frames, 4, 4), np.uint8)),
        "open_text": FakeText,
        "read_picture": lambda path, framing: np.full((framing.height, framing.width, 3), len(str(path)), np.uint8),
    }.items():
        monkeypatch.setattr(preview, name, fake)
    return Preview.of(load_config(PROFILE, list(overrides)), "stage2")


@pytest.mark.parametrize(("clips", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (9, [0, 1, 2, 3, 4])])
def test_clips_are_spread_over_the_validation_scenes(
    monkeypatch: pytest.MonkeyPatch, clips: int, expected: list[int]
) -> None:
    found = made(monkeypatch, SCENES, f"training.preview_clips={clips}")
    assert found is not None
    assert [clip.name for clip in found._clips] == [f"val{index}: Scene val{index}" for index in expected]
    assert made(monkeypatch, SCENES[:1]) is None


def test_one_sheet_shows_all_clips_real_and_generated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = made(monkeypatch, SCENES, "generate.stripe_rows=48", "generate.unconditional=rflow")
    assert found is not None
    sampled: list[Any] = []
    nulls: list[Any] = []
    monkeypatch.setattr(preview, "unconditional", lambda *given, **_: nulls.append(given[2]))

    def sample(_network: Any, conditions: Any, shape: Any, **_: Any) -> torch.Tensor:
        sampled.append(conditions)
        return torch.zeros(1, 6, 4, *shape)

    monkeypatch.setattr(preview, "sample_latents", sample)
    network: Any = mock.Mock(before_proj=torch.nn.Linear(1, 1), unconditional="consistent")
    latents = found.sample(network, NeverStop())
    assert latents is not None
    assert [len(sampled), latents[0].shape] == [3, (6, 4, 3, 10, 18)]
    colours = iter([colour for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250)) for _ in range(6)])

    def decode(view: torch.Tensor) -> Any:
        assert view.shape[:2] == (1, 4)  # one view at a time: six take 34 GiB at 224x400
        yield np.broadcast_to(np.array(next(colours), np.uint8), (1, 9, 112, 200, 3))

    vae = mock.Mock(decode=decode)
    monkeypatch.setattr(preview, "read_json", lambda _: {"vae": {"path": "", "scaling_factor": 1.0}})
    load = mock.Mock(return_value=vae)
    monkeypatch.setattr(preview.Vae, "load", load)
    path = tmp_path / "sheet.png"
    assert found.write(latents, 7, path, NeverStop())
    assert load.call_args.kwargs["stripe_rows"] == 48
    assert nulls == ["rflow"] * 3
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    lower = sheet[len(sheet) * 3 // 4]
    columns = [np.flatnonzero((lower[:, index] > 200) & (lower.sum(1) < 300)).mean() for index in range(3)]
    assert columns == sorted(columns)


def test_a_preview_ends_when_a_stop_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(monkeypatch, SCENES)
    assert found is not None
    stop: Any = mock.Mock(requested=False)

    def sample(_network: Any, _conditions: Any, shape: Any, **_: Any) -> torch.Tensor:
        stop.requested = True
        return torch.zeros(1, 6, 4, *shape)

    monkeypatch.setattr(preview, "sample_latents", sample)
    network: Any = mock.Mock(before_proj=torch.nn.Linear(1, 1), unconditional="consistent")
    assert found.sample(network, stop) is None
