"""The documents of the project, their fenced blocks and the shell commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PROJECT

FENCE = re.compile(r"^( *)```(.*)$")
NEEDS = "# needs: "
LOOP = re.compile(r"for (\w+) in ([\w ]+); do (.*?)(?: \|\| break)?; done")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        file: its document.
        line: number of its first line.
        language: what follows the backticks.
        text: what is between them.
    """

    file: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        """Document and line, for messages."""
        return f"{self.file.relative_to(PROJECT)}:{self.line}"

    @property
    def needs(self) -> str | None:
        """What the reader must have before the commands can run; None: nothing."""
        first = self.text.partition("\n")[0]
        return first.removeprefix(NEEDS) if first.startswith(NEEDS) else None

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command; a loop gives the commands of its turns."""
        for line in self.text.replace("\\\n", " ").splitlines():
            loop = LOOP.fullmatch(line)
            turns = [line] if loop is None else [loop[3].replace(f"${loop[1]}", word) for word in loop[2].split()]
            for turn in turns:
                if words := shlex.split(turn, comments=True):
                    yield words


def documents() -> list[Path]:
    """Return every Markdown file of the project."""
    folders = [PROJECT / "docs", PROJECT / "benchmarks"]
    return sorted([*PROJECT.glob("*.md"), *(file for folder in folders for file in folder.rglob("*.md"))])


def blocks() -> list[Block]:
    """Return every fenced block of every document."""
    found = []
    for file in documents():
        start: tuple[int, str, list[str]] | None = None
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            fence = FENCE.match(line)
            if fence and start is None:
                start = number, fence[2], []
            elif fence and start is not None:
                found.append(Block(file, start[0], start[1], "\n".join(start[2])))
                start = None
            elif start is not None:
                start[2].append(line)
        assert start is None, f"{file}: a fence is not closed"
    return found
