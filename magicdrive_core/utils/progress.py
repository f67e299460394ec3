"""What long work says on stderr: an estimate before it starts, then a progress bar, which needs a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """A progress display in the project's style, to be used as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Generator[T, None, None]:
    """Yields ``items`` while a bar shows how far they are."""
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=description)


def announce(work: str, amount: str, size: float, seconds: float) -> None:
    """Says how large and how long some work will be, before it starts.

    Args:
        work: its name, for example "text".
        amount: how much there is to do, for example "14 texts".
        size: bytes of the result.
        seconds: that it will take, by a sample.
    """
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{work}: {amount}, {size / 1e6:,.1f} MB, about {seconds / 60:,.1f} minutes"
    )
