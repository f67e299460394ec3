"""The README's list of files: every one there, each described as it describes itself."""

from __future__ import annotations

import ast
import re

from tests.conftest import PROJECT

PACKAGES = ("flows", "magicdrive_core", "benchmarks")


def listed() -> dict[str, str]:
    """Descriptions by path, from the README."""
    house = (PROJECT / "README.md").read_text().split("## The house", 1)[1].split("```", 2)[1]
    found, folder = {}, ""
    for line in house.splitlines():
        name, _, description = line.strip().partition(" ")
        if name.endswith("/"):
            folder = name
        elif folder.startswith(PACKAGES) and line.startswith("  "):
            found[folder + name] = description.strip()
    return found


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def test_every_file_of_the_packages_is_listed() -> None:
    files = {
        path.relative_to(PROJECT).as_posix()
        for package in PACKAGES
        for path in (PROJECT / package).rglob("*")
        if re.fullmatch(r"(?!__).*\.(py|j2|cpp|h)", path.name)
    }
    assert set(listed()) == files


def test_each_line_is_the_beginning_of_the_files_own_docstring() -> None:
    modules = {path: description for path, description in listed().items() if path.endswith(".py")}
    own = {path: plain(ast.get_docstring(ast.parse((PROJECT / path).read_text())) or "") for path in modules}
    assert {path: line for path, line in modules.items() if not own[path].startswith(plain(line))} == {}
