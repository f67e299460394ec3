"""Fixtures of the data room: small copies of data roots that a test may change, and their infos."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data.infos import build_infos, read_scenes
from magicdrive_core.data.records import Scene

PROFILES = Path(__file__).resolve().parents[2] / "profiles"

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """``make_config(root, version, published=False, val_scenes="auto")``: the demo's on another data root."""

    def make(root: Path, version: str = "v1.0-demo", *, published: bool = False, val_scenes: object = "auto") -> Config:
        values = yaml.safe_load((PROFILES / "demo.yaml").read_text(encoding="utf-8"))
        values["conditions"]["map_cells"] = {"80x144": 200, "96x176": 200}
        values["latents"]["start_stride"] = 4
        values |= {"published": published, "data": {"root": str(root), "version": version, "val_scenes": val_scenes}}
        return parse_config(values)

    return make


@pytest.fixture(scope="session")
def infos(synthetic_root: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Infos of the generated data, by time stamp. Tests must not change them."""
    folder = tmp_path_factory.mktemp("infos") / "infos"
    build_infos(make_config(synthetic_root), folder)
    return folder


@pytest.fixture(scope="session")
def scenes(infos: Path) -> list[Scene]:
    """The generated scenes."""
    return read_scenes(infos)


@pytest.fixture
def root_copy(synthetic_root: Path, tmp_path: Path) -> Path:
    """A copy of the generated data root that a test may change; pictures are links."""
    shutil.copytree(synthetic_root, tmp_path / "root", copy_function=_copy)
    return tmp_path / "root"


def _copy(source: str, target: str) -> None:
    if source.endswith(".jpg"):
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)
