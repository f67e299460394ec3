"""Bundles: written from a finished project, named by settings like any model, refused where a file has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from magicdrive_core.config.schema import Config, TextBuild
from magicdrive_core.encoders.build_encoders import build_encoders
from magicdrive_core.encoders.text import TextEncoder, build_text_encoder
from magicdrive_core.encoders.vae import Vae
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.experiment.bundle_writer import figure_lines, write_bundle
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.experiment.stages import plan_stage
from magicdrive_core.tracking.bundle import read_bundle, verify_bundle
from magicdrive_core.training.check_start import check_start
from magicdrive_core.utils.files import read_json, write_json
from tests.inference.project import STAGE, make_project, small_config, small_scene

FIGURES = {
    "scenes": ["scene-0001"],
    "frames": {"scene-0001": [0, 3]},
    "regions": {"generated": {"road": 0.9, "vehicle": 0.31, "psnr": None}, "untrained": {"road": 0.2, "vehicle": 0.0}},
    "shares": {"road": 0.95},
    "edits": {"removed": {"share": 0.5}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project of a small network, and its bundle. Tests must not change it."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder, small_config(), small_scene())
    build = TextBuild(width=16, layers=1, heads=2, feed_forward=16, seed=1)
    build_text_encoder(build, ["Fog", "car"], folder / "artifacts/encoders/text")
    encoders = folder / "artifacts/encoders/encoders.json"
    facts = read_json(encoders)
    write_json(encoders, facts | {"vae": facts["vae"] | {"scaling_factor": 0.75}})
    write_json(folder / "fidelity.json", FIGURES)
    (folder / "notes.md").write_text("## Limits\n\nIt knows one scene.\n")
    write_bundle(
        small_config(f"generate.weights={STAGE}"),
        folder / "town",
        licence="CC0-1.0",
        notes=folder / "notes.md",
        figures=folder / "fidelity.json",
        project=folder,
    )
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "project")


def from_bundle(*overrides: str) -> Config:
    return small_config("training.start_from=town", "training.first_stage=stage3", *overrides)


def test_a_bundle_says_what_it_is(made: Path) -> None:
    facts = verify_bundle(made / "town")
    assert {name.split("/")[0] for name in facts["files"]} == {"network", "vae", "text", "model_card.md"}
    assert (facts["stage"], facts["licence"], facts["profile"]) == ("stage3", "CC0-1.0", "demo")
    assert facts["figures"] == FIGURES
    assert "cluster" not in facts["settings"]
    card = (made / "town/model_card.md").read_text()
    for text in (
        "CC0-1.0",
        "| generated | - | 0.900 | 0.310 |",
        "Shares:",
        "It knows one scene.",
        "scaling factor 0.75",
    ):
        assert text in card
    assert str(made) not in card + (made / "town/bundle.json").read_text()


def test_a_bundle_generates_and_starts_a_training(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the project that wrote it, too, whose encoders have other digests than their copies."""
    config = from_bundle("generate.weights=town")
    paths = find_run_paths(config, project=made)
    assert paths.model.folder == made / "town/network"
    assert paths.model.done
    plan = plan_stage(config, "stage3", made)
    assert plan.start is not None
    weights = load_file(plan.start.weights)
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in load_file(made / STAGE / "ema.safetensors").items()
    )
    check_start(config, plan, made)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_settings_take_the_encoders_of_a_bundle_without_building_them(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(made)
    config = from_bundle("vae={path: town/vae, scaling_factor: stored}", "text={path: town/text, max_tokens: 8}")
    out = made / "built"
    build_encoders(config, made / "artifacts/infos", out / "artifacts/encoders")
    facts = read_json(out / "artifacts/encoders/encoders.json")
    assert facts["vae"]["scaling_factor"] == 0.75
    assert {name: facts[name]["path"] for name in facts} == {"vae": "town/vae", "text": "town/text"}
    (out / "town").symlink_to(made / "town")
    check_start(config, plan_stage(config, "stage3", out), out)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # the encoders are the bundle's


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def read_all(project: Path) -> None:
    config = from_bundle()
    check_start(config, plan_stage(config, "stage3", project), project)
    Vae.load(project / "town/vae", scaling_factor=1.0)
    TextEncoder.load(project / "town/text", 8)


@pytest.mark.parametrize(
    "file",
    ["network/ema.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text/config.json"],
)
def test_a_changed_file_is_refused_wherever_it_is_read(project: Path, file: str) -> None:
    read_all(project)
    damage(project / "town" / file)
    with pytest.raises(MagicDriveError, match="another digest") as raised:
        read_all(project)
    assert file.split("/")[-1] in raised.value.message
    assert "\n" not in str(raised.value)
    with pytest.raises(MagicDriveError, match=f"{file} has another digest"):
        verify_bundle(project / "town")


def test_a_digest_that_was_changed_with_its_file_is_refused(project: Path) -> None:
    run = project / "town/network/run.json"
    write_json(run, read_json(run) | {"weights_sha256": "0" * 64})
    with pytest.raises(MagicDriveError, match=r"another digest than bundle\.json recorded"):
        plan_stage(from_bundle(), "stage3", project)


@pytest.mark.parametrize("change", ["missing", "more"])
def test_missing_and_additional_files_are_refused(project: Path, change: str) -> None:
    file = project / "town/vae/more.json"
    if change == "missing":
        file = project / "town/model_card.md"
        file.unlink()
    else:
        file.write_text("{}")
    with pytest.raises(MagicDriveError, match=f"the file {file.relative_to(project / 'town')}"):
        verify_bundle(project / "town")


@pytest.mark.parametrize("content", ["[]", '{"format": 99, "files": {}}', "{"])
def test_a_damaged_description_is_refused(project: Path, content: str) -> None:
    (project / "town/bundle.json").write_text(content)
    with pytest.raises(MagicDriveError, match=r"bundle\.json is not"):
        read_bundle(project / "town")


def test_nothing_but_a_bundle_is_replaced(project: Path) -> None:
    config = small_config(f"generate.weights={STAGE}")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        write_bundle(config, project / "artifacts", licence="CC0-1.0", project=project)
    write_bundle(config, project / "town", licence="MIT", project=project)
    assert read_bundle(project / "town")["licence"] == "MIT"


def test_an_unfinished_training_makes_no_bundle(project: Path) -> None:
    damage(project / STAGE / "ema.safetensors")
    config = small_config(f"generate.weights={STAGE}")
    with pytest.raises(MagicDriveError, match="holds no finished training"):
        write_bundle(config, project / "new", licence="MIT", project=project)
    assert not (project / "new").exists()


def test_figures_of_generated_videos_stand_side_by_side() -> None:
    here = {"regions": {"generated": {"road": 0.85, "mark": 0.5}}, "shares": {"road": 0.9}}
    assert [line.split() for line in figure_lines(FIGURES, here)[1:]] == [
        ["regions", "road", "0.900", "0.850", "-0.050"],
        ["regions", "vehicle", "0.310", "-"],
        ["regions", "psnr", "-", "-"],
        ["shares", "road", "0.950", "0.900", "-0.050"],
        ["edits", "removed", "share", "0.500", "-"],
        ["regions", "mark", "-", "0.500"],
    ]
