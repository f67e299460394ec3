"""A data root before anything is read: whether tables, maps and pictures are where they should be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from magicdrive_core.errors import MagicDriveError

MAPS = "unpack the nuScenes map expansion v1.3 into maps/ (nuScenes-map-expansion-v1.3.zip)"


def find_tables(root: Path | str, version: str) -> Path:
    """The folder of the tables.

    Raises:
        MagicDriveError: it is not there; the hint says what is.
    """
    root = Path(root)
    folder = root / version
    if not folder.is_dir():
        raise MagicDriveError(f"{folder} is missing: no nuScenes tables there", _versions_of(root))
    return folder


def check_root(root: Path | str, version: str) -> None:
    """Makes sure that a root has the folders of tables and maps.

    Raises:
        MagicDriveError: one is missing.
    """
    find_tables(root, version)
    maps = Path(root) / "maps"
    if not maps.is_dir():
        raise MagicDriveError(f"{maps} is missing: no nuScenes maps there", MAPS)


@dataclass(frozen=True)
class Pictures:
    """What is seen of pictures without reading them.

    Names and lengths, no dates: a copied data set is the same one. A JPEG of another content has another length but
    for rare chances, and a set of exchanged ones in no case.
    """

    bytes: int
    digest: str  # hex SHA-256 over names and lengths

    @classmethod
    def below(cls, root: Path, paths: Iterable[str]) -> Pictures:
        """Looks at every one of ``paths`` below ``root``; a missing one has no length."""
        total, digest = 0, hashlib.sha256()
        for path in sorted(set(paths)):
            try:
                size = (root / path).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                size = 0
            total += size
            digest.update(f"{path}\0{size}\n".encode())
        return cls(total, digest.hexdigest())


def _versions_of(root: Path) -> str:
    if not root.is_dir():
        return f"{root} does not exist: set data.root in params.yaml, or run `magicdrive synth`"
    versions = sorted(table.parent.name for table in root.glob("*/sample_data.json"))
    if versions:
        return f"set data.version in params.yaml to one of: {', '.join(versions)}"
    return "set data.root in params.yaml to a nuScenes root, or run `magicdrive synth`"
