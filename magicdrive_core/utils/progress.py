"""Progress of long work on stderr: an estimate before it starts, then a bar if stderr is a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """Makes a progress display in the project's style; use it as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Generator[T, None, None]:
    """Yields ``items`` while a progress bar counts them.

    Args:
        items: what to iterate over.
        description: label of the bar.
        total: number of items, where ``items`` has no length.

    Yields:
        The items, unchanged and in order. Close the generator to remove the bar before an error is printed.
    """
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=description)


def announce(work: str, amount: str, size: float, seconds: float) -> None:
    """Prints the estimated size and duration of some work before it starts.

    Args:
        work: name of the work, for example "text".
        amount: what there is to do, for example "14 texts".
        size: size of the result in bytes.
        seconds: estimated duration, from a sample.
    """
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{work}: {amount}, {size / 1e6:,.1f} MB, about {seconds / 60:,.1f} minutes"
    )
