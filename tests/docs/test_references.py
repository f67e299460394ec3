"""Files, links and settings that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from magicdrive_core.config.schema import Config
from tests.conftest import PROJECT
from tests.docs.documents import documents

CORE = PROJECT / "magicdrive_core"
ROOTS = [PROJECT, CORE, PROJECT / "tests"]
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|cpp|toml|j2)")
SETTING = re.compile(r"([a-z_]+)\.([a-z_0-9.]+)(?:: .*)?")
FILES = {"dvc", "json"}  # data.dvc and scores.json are files, not settings
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# Records of what was measured or changed may name what was removed since.
HISTORY = {"CHANGELOG.md"}


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(PROJECT)))
def test_named_files_exist(file: Path) -> None:
    if file.name in HISTORY:
        return
    named = [path for code in CODE.findall(file.read_text(encoding="utf-8")) for path in PATH.findall(code)]
    made = (".prefect/", "runs/", "outputs/", "artifacts/", "data/v1", "weights/")
    missing = [
        path
        for path in named
        if not path.startswith(made) and not any((root / path).exists() for root in [*ROOTS, file.parent])
    ]
    assert missing == []


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(PROJECT)))
def test_links_between_files_lead_somewhere(file: Path) -> None:
    """As in a file browser. The site leads links to generated pages; its strict build checks them there."""
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        if not (file.parent / link).exists():
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(PROJECT)))
def test_named_settings_exist(file: Path) -> None:
    if file.name in HISTORY:
        return
    sections = Config.model_fields
    unknown = []
    for code in CODE.findall(file.read_text(encoding="utf-8")):
        match = SETTING.fullmatch(code.replace("<stage>", "stage1"))
        if match and match[1] in sections and match[2] not in FILES and not known(match[1], match[2]):
            unknown.append(code)
    assert unknown == []


def known(section: str, key: str) -> bool:
    """Whether params.yaml may hold ``section.key``."""
    schema = Config.model_json_schema()
    nodes = [schema["properties"][section]]
    for name in key.split("."):
        found = [node["properties"][name] for node in resolved(nodes, schema) if name in node.get("properties", {})]
        if not found:
            return any("additionalProperties" in node for node in resolved(nodes, schema) if "properties" not in node)
        nodes = found
    return True


def resolved(nodes: list[dict], schema: dict) -> list[dict]:
    """Return the alternatives of a JSON schema's nodes, references followed."""
    out = []
    for node in nodes:
        for choice in node.get("anyOf", [node]):
            reference = choice.get("$ref")
            out.append(schema["$defs"][reference.rpartition("/")[2]] if reference else choice)
    return out
