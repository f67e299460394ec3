"""Python examples in the documents run, each document in a namespace of its own; YAML examples are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from magicdrive_core.config.schema import Cluster
from magicdrive_core.data.edits import Edits
from tests.docs.documents import blocks

PYTHON = sorted({block.file for block in blocks() if block.language == "python"})


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.name)
def test_python_examples_run(file: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in blocks():
        if block.file == file and block.language == "python":
            exec(compile(block.text, block.where, "exec"), namespace)


def test_yaml_examples_are_accepted() -> None:
    checked = 0
    for block in blocks():
        if block.language != "yaml":
            continue
        example = yaml.safe_load(block.text)
        if set(example) == {"cluster"}:
            Cluster.model_validate(example["cluster"])
        else:
            Edits.model_validate(example)
        checked += 1
    assert checked >= 2
