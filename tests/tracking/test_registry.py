"""Registered models generate: found by alias and by version, pin_registered, refused where the file is another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicdrive_core.config.schema import Tracking
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.experiment.run_paths import find_run_paths, pin_registered
from magicdrive_core.tracking.registry import find_registered
from magicdrive_core.tracking.runs import Store
from magicdrive_core.utils.files import sha256_file, write_json
from tests.inference.project import small_config

CHAMPION = "models:/magicdrive-demo@champion"


def trained(project: Path, name: str, content: bytes) -> tuple[Path, str]:
    """A finished run's weights and their digest."""
    folder = project / "runs with spaces" / name
    folder.mkdir(parents=True)
    weights = folder / "ema.safetensors"
    weights.write_bytes(content)
    write_json(folder / "run.json", {"stage": "stage2", "weights_sha256": sha256_file(weights)})
    write_json(folder / "mlflow.json", {"run": f"run-{name}", "model_version": "1"})
    return weights, sha256_file(weights)


@pytest.fixture
def store(project: Path) -> Store:
    """Two versions; the first one is the champion."""
    store = Store(Tracking(), project)
    for name in ("a", "b"):
        store.register("magicdrive-demo", "stage2", *trained(project, name, name.encode()), store.open(name, {}))
    store.client.set_registered_model_alias("magicdrive-demo", "champion", "1")
    return store


def test_an_alias_and_a_version_lead_to_the_weights(project: Path, store: Store) -> None:
    for uri, name in ((CHAMPION, "a"), ("models:/magicdrive-demo@stage2", "b"), ("models:/magicdrive-demo/1", "a")):
        config = small_config(f"generate.weights={uri}")
        paths = find_run_paths(config, project=project)
        assert (paths.model.stage, paths.model.folder.name, paths.model.done) == ("stage2", name, True)
        assert paths.model_tags(config) == {
            "model": uri,
            "model.sha256": sha256_file(paths.model.weights),
            "model.run": f"run-{name}",
        }


def test_a_pinned_model_stays_when_its_alias_moves(project: Path, store: Store) -> None:
    (override,) = pin_registered(small_config(f"generate.weights={CHAMPION}"), project)
    store.client.set_registered_model_alias("magicdrive-demo", "champion", "2")
    assert override == "generate.weights=models:/magicdrive-demo/1"
    assert find_run_paths(small_config(override), project=project).model.folder.name == "a"
    assert pin_registered(small_config(override), project) == [override]
    assert (
        pin_registered(small_config("generate.weights=runs/published"), project)
        == pin_registered(small_config(), project)
        == []
    )


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/magicdrive-demo@best", "models:/magicdrive-demo@best is not in the registry"),
        ("models:/magicdrive-demo/7", "is not in the registry"),
        ("models:/other/1", "is not in the registry"),
        ("models:/magicdrive-demo", "is not the name of a registered model"),
    ],
)
def test_what_the_registry_does_not_know_is_one_line(project: Path, store: Store, uri: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        find_registered(Tracking(), uri, project)
    assert "\n" not in str(raised.value)
    if "registry" in message:
        assert "magicdrive-demo@champion" in raised.value.hint


def test_weights_that_were_exchanged_or_moved_are_refused(project: Path, store: Store) -> None:
    run = project / "runs with spaces/a/run.json"
    write_json(run, {"stage": "stage2", "weights_sha256": "0" * 64, "run": None})
    with pytest.raises(MagicDriveError, match="has changed since it was registered as models:/magicdrive-demo/1"):
        find_registered(Tracking(), CHAMPION, project)
    run.parent.rename(project / "elsewhere")
    with pytest.raises(MagicDriveError, match=r"run\.json is missing"):
        find_registered(Tracking(), CHAMPION, project)
