"""metrics.jsonl: the whole history of a run, a JSON object for each step. All else that shows metrics is made from it.

No torch in here: the launcher sends the lines to MLflow (delivery.py), and the report draws them.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from magicdrive_core.utils.files import atomic_file

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"

Line = dict[str, Any]  # the fields of recorder.StepStatistics, and what rank 0 adds to them


def parse_lines(data: bytes) -> tuple[dict[int, Line], list[int]]:
    """Parse a piece of the file.

    Args:
        data: lines.

    Returns:
        The lines by step in the order of the steps, where the last line of a step counts; and the numbers of the lines
        that are no steps, counted from 1 within ``data``.
    """
    found: dict[int, Line] = {}
    bad: list[int] = []
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = json.loads(text)
            step, loss = line["step"], line["loss"]
        except (ValueError, TypeError, KeyError, RecursionError):
            bad.append(number)
            continue
        if type(step) is int and step > 0 and (loss is None or isinstance(loss, int | float)):
            found[step] = line
        else:
            bad.append(number)
    return dict(sorted(found.items())), bad


def read_metrics(path: Path, last: int | None = None) -> list[Line]:
    """Read a run's steps, and warn of lines that are damaged and of steps that are missing.

    Args:
        path: ``metrics.jsonl``; it may be missing.
        last: step after which lines are left out; None reads all.

    Returns:
        The lines in the order of their steps.

    Raises:
        OSError: the file cannot be read.
    """
    lines, bad = parse_lines(path.read_bytes() if path.is_file() else b"")
    kept = {step: line for step, line in lines.items() if last is None or step <= last}
    end = last if last is not None else max(kept, default=0)
    missing = [step for step in range(1, end + 1) if step not in kept]
    if bad:
        logger.warning("%s: line %s is damaged and left out", path, _ranges(bad))
    if missing:
        logger.warning("%s: step %s is missing in it; the training itself is whole", path, _ranges(missing))
    return list(kept.values())


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers briefly: 3, 5 to 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in parts)


class MetricsFile:
    """Appends the lines of a run. A line is whole or absent, whatever the disk does and whenever the process is killed.

    Lines that cannot be written, because the disk is full or away, wait in memory until it takes them again.
    """

    def __init__(self, path: Path, last: int) -> None:
        """Read the lines so far, and drop those of later steps, which are made again.

        Args:
            path: ``metrics.jsonl``.
            last: the step from which the run resumes.

        Raises:
            MagicDriveError: lines must be dropped and the disk is full or not writable.
            OSError: the file cannot be read.
        """
        self._path = path
        self.lines = read_metrics(path, last)
        data = b"".join(map(_encoded, self.lines))
        if not path.is_file() or path.read_bytes() != data:
            with atomic_file(path) as partial:
                partial.write_bytes(data)
        self._end = len(data)  # bytes of whole lines in the file
        self._waiting: list[bytes] = []
        self._file: FileIO | None = None

    def append(self, line: Line) -> None:
        """Write a line. It survives a kill of the process from then on, unless the disk refuses it.

        Args:
            line: of the next step.
        """
        self._waiting.append(_encoded(line))
        self._write()

    def close(self) -> None:
        """Write the lines that wait, if the disk takes them now, and close the file."""
        if self._waiting:
            self._write()
        if self._waiting:
            logger.warning("%s: the last %d steps could not be written", self._path, len(self._waiting))
        self._close()

    def _write(self) -> None:
        waited = len(self._waiting) > 1
        data = memoryview(b"".join(self._waiting))
        try:
            if self._file is None:
                self._file = FileIO(self._path, "ab")
                self._file.truncate(self._end)  # a line that was half written when the disk was full
            rest = data
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            if not waited:
                logger.warning(
                    "%s cannot be written: %s; its lines wait in memory, training continues", self._path, error.strerror
                )
            self._close()
            return
        if waited:
            logger.warning("%s is written again, with all lines that waited", self._path)
        self._end += len(data)
        self._waiting.clear()

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(self._end)
            with suppress(OSError):
                self._file.close()
            self._file = None


def _encoded(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"
