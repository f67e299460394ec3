"""Pages of the site that are not files below docs/, so that no text exists twice.

- ``contributing.md``, ``changelog.md``: from the root of the project.
- ``results/*.md``: from ``benchmarks/results``.
- ``reference/command-line.md``: from the command line itself.
- ``reference/api/*.md``: a page for each package of ``magicdrive_core``, filled by mkdocstrings.

Documents link to the files themselves, so that links work in the file tree too. Here they lead to the pages.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from magicdrive_core.cli.main import app

PROJECT = Path(__file__).resolve().parents[1]
COPIED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COMMANDS = {"magicdrive_core/cli/main.py": "reference/command-line.md"}
CORE = PROJECT / "magicdrive_core"
EXAMPLE = re.compile(r"^Example: (.*)$", re.M)


def on_config(config: MkDocsConfig) -> None:
    """Fill the sections of the navigation that list what is there: API, decisions, results."""
    decisions = sorted((PROJECT / "docs/decisions").glob("[0-9]*.md"))
    sections = {
        "API": [f"reference/api/{name}.md" for name in _packages()],
        "Decisions": ["decisions/index.md", *[f"decisions/{path.name}" for path in decisions]],
        "Results": ["results/index.md", *[page for page in _results().values() if page != "results/index.md"]],
    }
    config.nav = _filled(config.nav, sections)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, page in (COPIED | _results()).items():
        text = (PROJECT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, source, page)))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    for name, summary in _packages().items():
        files.append(File.generated(config, f"reference/api/{name}.md", content=_api_page(name, summary)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Lead links from documents to files outside docs/ to the pages of these files."""
    source = f"docs/{page.file.src_uri}"
    return _relinked(markdown, source, page.file.src_uri) if (PROJECT / source).is_file() else markdown


def command_line() -> str:
    """Return the reference of the command line as Markdown, a section for each verb."""
    lines = [
        "# Command line",
        "",
        "One verb for each piece of work. DVC stages, Prefect flows and `make` call the same verbs.",
        "This page is generated from the commands; `magicdrive VERB --help` prints the same.",
        "",
        "Exit codes: 1 the work failed, 2 wrong command line or settings, 130 interrupted, 143 terminated.",
        "",
    ]
    for path, command in _verbs(typer.main.get_command(app), "magicdrive"):
        context = command.make_context(path, [], resilient_parsing=True)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        lines += [f"## {path}", "", EXAMPLE.sub(r"Example: `\1`", command.help or ""), "", "```text", usage, "```", ""]
        records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
        if records:
            rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in records]
            lines += ["| argument or option | meaning |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def _verbs(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name in command.commands:
            yield from _verbs(command.commands[name], f"{path} {name}")
    else:
        yield path, command


def _packages() -> dict[str, str]:
    """Return the packages of magicdrive_core with the first line of their docstrings."""
    found = {}
    for file in sorted(CORE.glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.parent.name] = docstring
    return found


def _api_page(name: str, docstring: str) -> str:
    modules = sorted(path for path in (CORE / name).rglob("*.py") if path.name != "__init__.py")
    lines = [f"# {name}", "", docstring, ""]
    for path in modules:
        module = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        lines += [f"## {module.removeprefix('magicdrive_core.')}", "", f"::: {module}", "    options:"]
        lines += ["      heading_level: 3", "      show_root_heading: false", ""]
    return "\n".join(lines)


def _results() -> dict[str, str]:
    """Return the pages of measured results by their source."""
    found = sorted((PROJECT / "benchmarks/results").glob("*.md"))
    return {
        str(path.relative_to(PROJECT)): f"results/{'index' if path.stem == 'README' else path.stem}.md"
        for path in found
    }


def _relinked(text: str, source: str, page: str) -> str:
    """Return the text with links that are relative to ``source`` made relative to ``page``."""
    api = {f"magicdrive_core/{name}/__init__.py": f"reference/api/{name}.md" for name in _packages()}
    pages = COPIED | COMMANDS | api | _results()

    def target(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if "://" in link or not link:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        goal = pages.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)]*)?\)", target, text)


def _filled(nav: Any, sections: dict[str, list[str]]) -> Any:
    if isinstance(nav, list):
        return [_filled(entry, sections) for entry in nav]
    if isinstance(nav, dict):
        return {key: sections.get(key) or _filled(value, sections) for key, value in nav.items()}
    return nav
