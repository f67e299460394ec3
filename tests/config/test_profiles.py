"""profiles/ and params.yaml, and `magicdrive use`, which writes the one from the other."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from magicdrive_core.config.load import load_config
from magicdrive_core.config.profiles import use_profile
from magicdrive_core.config.schema import STAGES
from magicdrive_core.diffusion.frame_masks import check_ratios
from magicdrive_core.errors import UsageError
from tests.conftest import PROJECT

PROFILES = sorted(path.stem for path in (PROJECT / "profiles").glob("*.yaml"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(PROJECT / "profiles", tmp_path / "profiles")
    return tmp_path


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_valid(name: str) -> None:
    config = load_config(PROJECT / f"profiles/{name}.yaml")
    assert config.profile == name
    for stage in STAGES:
        check_ratios(config.training.stage(stage).mask_ratios, stage)
    assert config.generate.frames >= config.submission.frames


def test_the_committed_params_are_the_demo_profile() -> None:
    committed = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=PROJECT, capture_output=True, check=False)
    if committed.returncode:
        pytest.skip("not a git checkout")
    assert committed.stdout == one_folder_higher("demo")


def test_use_copies_a_profile_byte_for_byte_but_the_path_of_the_schema(project: Path) -> None:
    use_profile("mini", [], project=project)
    assert (project / "params.yaml").read_bytes() == one_folder_higher("mini")


def one_folder_higher(name: str) -> bytes:
    """Returns a profile's bytes, whose first line names the schema relative to the file."""
    return (PROJECT / f"profiles/{name}.yaml").read_bytes().replace(b"$schema=../", b"$schema=")


def test_use_with_overrides_changes_those_values_only(project: Path) -> None:
    use_profile("demo", ["synth=null", "data.root=/some/where", "data.version=v1.0-mini"], project=project)
    expected = yaml.safe_load((PROJECT / "profiles/demo.yaml").read_text())
    expected |= {"synth": None}
    expected["data"] |= {"root": "/some/where", "version": "v1.0-mini"}
    text = (project / "params.yaml").read_text()
    assert yaml.safe_load(text) == expected
    assert "\nlatents:\n  start_stride: " in text  # the layout stays


def test_use_goes_from_one_made_file_to_another(project: Path) -> None:
    use_profile("demo", ["synth=null", "data.root=/a b"], project=project)
    use_profile("mini", ["data.root=/c"], project=project)
    use_profile("demo", [], project=project)
    assert load_config(project / "params.yaml").profile == "demo"


def test_use_never_overwrites_changes_made_by_hand(project: Path) -> None:
    use_profile("demo", ["data.root=/a", "latents.start_stride=4"], project=project)
    params = project / "params.yaml"
    mine = params.read_text().replace("start_stride: 4", "start_stride: 2")
    params.write_text(mine)
    with pytest.raises(UsageError, match="changed by hand"):
        use_profile("demo", [], project=project)
    assert params.read_text() == mine
    use_profile("demo", ["latents.start_stride=3"], project=project, force=True)
    assert load_config(params).latents.start_stride == 3


def test_use_writes_nothing_that_is_invalid(project: Path) -> None:
    for override in ("data.rot=/a", "training.stage1.steps=-1", "nonsense"):
        with pytest.raises(UsageError):
            use_profile("demo", [override], project=project)
    with pytest.raises(UsageError, match="no profile"):
        use_profile("demos", [], project=project)
    assert not (project / "params.yaml").exists()
