"""Only device.py names kinds of devices, so that a new kind is one change."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from magicdrive_core import device

CORE = Path(__file__).resolve().parents[2] / "magicdrive_core"
NAMES = ("cuda", "npu", "nccl", "hccl")
# device.py chooses a device, launch/launcher.py counts device files; PYTORCH_NPU_ALLOC_CONF must be set before a
# process of the group exists.
ALLOWED = {"device.py", "launch/launcher.py", "launch/process_group.py"}


def named(path: Path) -> list[str]:
    """Returns attributes, names and strings in code (not comments or docstrings) that name a kind of device."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        if isinstance(node.body[0], ast.Expr)
    }
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
    return [word for word in words if any(part in NAMES for part in word.lower().replace(":", "_").split("_"))]


def test_no_other_module_names_a_kind_of_device() -> None:
    found = {str(path.relative_to(CORE)): named(path) for path in sorted(CORE.rglob("*.py"))}
    assert set(found) > ALLOWED
    assert found["device.py"]
    assert {path: words for path, words in found.items() if words and path not in ALLOWED} == {}


def test_the_search_finds_names_attributes_and_strings(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text('"""cuda in words."""\nimport torch\nif torch.cuda.is_available():\n    x.to("cuda:0").is_cuda\n')
    assert sorted(named(path)) == ["cuda", "cuda:0", "is_cuda"]


def test_all_processes_share_the_cpu() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert device.take_device(7) == device.this_device() == torch.device("cpu")
    assert device.backend() == "gloo"


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_processes_take_one_device_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(device, "kind", lambda: name)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    monkeypatch.setattr(device, "this_device", lambda: torch.device("meta"))
    device.take_device(1)
    device.take_device(3, share=True)
    assert taken == [1, 1]
    assert device.backend() == {"cuda": "nccl", "npu": "hccl"}[name]
    with pytest.raises(device.MagicDriveError, match="process 3 of this host has no device: there are 2"):
        device.take_device(2)
