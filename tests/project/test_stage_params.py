"""dvc.yaml lists exactly the keys of params.yaml that the code of each stage reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from magicdrive_core.cli import data_commands
from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Section
from tests.conftest import PROJECT
from tests.projects import copy_project

pytestmark = pytest.mark.timeout(900)  # the first test waits for `dvc repro`
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]


class Reads:
    """Records which keys of one configuration are read, and which sections are dumped whole."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: set[str] = set()
        paths: dict[int, str] = {}

        def walk(section: Section, path: str) -> None:
            paths[id(section)] = path
            for name in type(section).model_fields:
                value = getattr(section, name)
                if isinstance(value, Section):
                    walk(value, f"{path}{name}.")

        walk(config, "")
        reads, dump = self.keys, Section.model_dump

        def getattribute(section: Section, name: str) -> Any:
            value = object.__getattribute__(section, name)
            if id(section) in paths and name in type(section).model_fields and not isinstance(value, BaseModel):
                reads.add(f"{paths[id(section)]}{name}")
            return value

        def model_dump(section: Section, *words: Any, **options: Any) -> dict[str, Any]:
            if id(section) in paths:
                reads.add(paths[id(section)].rstrip("."))
            return dump(section, *words, **options)

        monkeypatch.setattr(Section, "__getattribute__", getattribute)
        monkeypatch.setattr(Section, "model_dump", model_dump)


@pytest.mark.parametrize("stage", STAGES)
def test_the_listed_params_are_those_that_are_read(
    stage: str, reproduced_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_project(reproduced_project, tmp_path / "project")
    monkeypatch.chdir(project)
    config = load_config()
    monkeypatch.setattr("magicdrive_core.config.load.load_config", lambda *_: config)
    with monkeypatch.context() as patch:
        reads = Reads(config, patch)
        getattr(data_commands, stage)()
    declared = {entry for entry in STAGES[stage]["params"] if isinstance(entry, str)}  # others name versions.py

    def covers(outer: str, inner: str) -> bool:
        return inner == outer or inner.startswith(f"{outer}.")

    # The version and root of the data are also in the path of the dependency.
    missing = {key for key in reads.keys if not any(covers(entry, key) for entry in declared)}
    assert not missing, "read, but not in dvc.yaml"
    idle = {entry for entry in declared if not any(covers(entry, key) or covers(key, entry) for key in reads.keys)}
    assert not idle, "in dvc.yaml, but not read"
