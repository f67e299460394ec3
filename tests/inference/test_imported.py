"""Generation with imported weights: where they are found, and that they need published: true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.published.checkpoint import import_checkpoint
from magicdrive_core.model.published.transformer import PublishedMagicDrive
from tests.inference.project import make_project, small_config, small_scene

IMPORTED = "generate.weights=runs/published-stage3"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    config = small_config("published=true")
    make_project(folder, config, small_scene())
    network = NetworkConfig.from_settings(
        config.model, latent_channels=4, text_width=16, text_tokens=8, stage="stage3", published=True
    )
    torch.manual_seed(5)
    torch.save(build_network(network).state_dict(), folder / "ema.pt")
    import_checkpoint(folder / "ema.pt", folder / "runs/published-stage3", "stage3", network)
    return folder


def test_imported_weights_generate(project: Path) -> None:
    """No training is planned, and the published network is built with its stored rotary tables."""
    config = small_config("published=true", IMPORTED, "generate.generations=1")
    paths = find_run_paths(config, project=project)
    assert paths.model.folder == project / "runs/published-stage3"
    assert paths.model.done
    network = Models.load(config, paths.model.folder, project).network
    assert network.config.published
    assert isinstance(network, PublishedMagicDrive)
    items = list_items(config, read_scenes(project / "artifacts/infos"))
    summary = generate_items(config, items, paths.model.folder, paths.generated, project=project)
    assert summary.made == [items[0].name]


def test_imported_weights_without_published_are_refused(project: Path) -> None:
    config = small_config(IMPORTED)
    with pytest.raises(MagicDriveError, match="oddities") as caught:
        Models.load(config, find_run_paths(config, project=project).model.folder, project)
    assert "published: true" in caught.value.hint


def test_missing_imported_weights_are_named(project: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"elsewhere.run\.json is missing") as caught:
        find_run_paths(small_config("generate.weights=elsewhere"), project=project)
    assert "import-checkpoint" in caught.value.hint


def test_the_path_of_the_weights_does_not_change_the_fingerprint(project: Path) -> None:
    (project / "mine").symlink_to("runs/published-stage3")
    there, here = (
        find_run_paths(small_config(f"generate.weights={name}"), project=project)
        for name in ("runs/published-stage3", "mine")
    )
    assert there.generated == here.generated
