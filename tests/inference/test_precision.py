"""Networks of lower precision and compiled ones generate almost the same frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.inference import writer as writing
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.video.frames import read_view
from magicdrive_core.video.item_record import ItemRecord
from tests.inference.project import STAGE, make_project, small_config, small_scene


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, small_config(), small_scene())
    return folder


def pictures(project: Path, out: Path, *settings: str) -> NDArray[np.float64]:
    """Frames (V, F, H, W, 3) of the first item at the network's size."""
    config = small_config("video.format=png", *settings)
    item = list_items(config, read_scenes(project / "artifacts/infos"))[0]
    generate_items(config, [item], project / STAGE, out, project=project)
    views = ItemRecord.read(out / item.name).views.values()
    return np.stack([list(read_view(out / item.name / entry.file)) for entry in views]).astype(float)


def test_precision_and_compilation_hardly_change_the_frames(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "full_size_image", lambda frame: frame)
    plain = pictures(project, tmp_path / "plain")
    compiled = pictures(project, tmp_path / "compiled", "generate.compile=aot_eager")
    assert np.abs(compiled - plain).max() <= 1
    halved = pictures(project, tmp_path / "bf16", "generate.precision=bf16")
    assert 0 < np.abs(halved - plain).mean() < 0.05 * plain.std()


def test_the_vae_stays_fp32_on_a_cpu(project: Path) -> None:
    models = Models.load(small_config("generate.precision=bf16"), project / STAGE, project)
    assert models.network.before_proj.weight.dtype == torch.bfloat16
    assert next(models.vae.model.parameters()).dtype == torch.float32
