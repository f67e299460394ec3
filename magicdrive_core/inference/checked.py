"""Which finished items were checked before, so that thousands of them need not be read at each start.

A complete check reads every byte of an item. After it, and after an item is written, sizes and times of its files are
noted in a folder beside the items. Files that still have them count as unchanged, as make, git and DVC have it. What
hands results on (the packages of a submission, the report) compares digests and never reads these notes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import write_unsynced

FOLDER = ".checked"

Stamps = dict[str, list[int]]
"""Size in bytes and modification time in nanoseconds of each file below an item's folder, by relative name."""


def stamps(folder: Path) -> Stamps:
    """Looks at the files of an item without reading them.

    Args:
        folder: folder of the item.

    Returns:
        Size and time of each file.

    Raises:
        OSError: the folder is missing or changes meanwhile.
    """
    return {name: [status.st_size, status.st_mtime_ns] for name, status in _files(folder, "")}


def _files(folder: Path | str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry.stat()


def was_checked(folder: Path, fingerprint: str, found: Stamps) -> bool:
    """Tells whether an item was checked when its files had these sizes and times.

    Args:
        folder: folder of the item.
        fingerprint: what the item must have been checked for.
        found: what ``stamps`` finds now.

    Returns:
        False, too, where no note can be read.
    """
    try:
        noted = json.loads(_note(folder).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return noted == {"fingerprint": fingerprint, "files": found}


def note_checked(folder: Path, fingerprint: str, found: Stamps) -> None:
    """Notes that an item's files are as its record says. Without room or permission nothing is noted.

    Args:
        folder: folder of the item.
        fingerprint: that of its record.
        found: sizes and times before they were checked.
    """
    with suppress(MagicDriveError, OSError):
        write_unsynced(_note(folder), json.dumps({"fingerprint": fingerprint, "files": found}).encode())


def _note(folder: Path) -> Path:
    return folder.parent / FOLDER / f"{folder.name}.json"
