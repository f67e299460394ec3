"""The scenes of an infos folder as processes read them: an Arrow file a scene, mapped and not copied.

The pages of a mapped file are the kernel's: all ranks and workers of a host share them, and they count as memory that
can be had back. What a process holds of its own is what it is working on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import pyarrow as pa

from magicdrive_core.data.records import Outline, Scene
from magicdrive_core.data.table import SCHEMA, from_table, to_table
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_file

SCENES = "scenes"
_REMAKE = "run `dvc repro infos` to make it again"


def scene_path(folder: Path, name: str) -> Path:
    """The file of a scene in an infos folder."""
    return folder / SCENES / f"{name}.arrow"


def write_scene(folder: Path, scene: Scene) -> None:
    """Writes the file of a scene, whole or not at all, with the rows of ``table.SCHEMA``."""
    with atomic_file(scene_path(folder, scene.name)) as partial, pa.ipc.new_file(str(partial), SCHEMA) as file:
        file.write_table(to_table(scene).combine_chunks())


def read_scene(path: Path) -> Scene:
    """One scene; its arrays are read-only views of the mapped file.

    Raises:
        MagicDriveError: missing, broken, or of another version.
    """
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if not file.schema.equals(SCHEMA):
            raise MagicDriveError(f"{path} was written by another version of this program", _REMAKE)
        return from_table(file.read_all())
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", _REMAKE) from None
    except (pa.ArrowException, OSError) as error:
        raise MagicDriveError(f"{path} cannot be read: {' '.join(str(error).split())}", _REMAKE) from None


class Scenes(Sequence[Scene]):
    """The scenes of an infos folder in the order of their names; each is read again whenever it is asked for.

    Raises:
        MagicDriveError: there are none.
    """

    def __init__(self, folder: Path | str) -> None:
        self._paths = sorted((Path(folder) / SCENES).glob("*.arrow"))
        if not self._paths:
            raise MagicDriveError(f"{Path(folder) / SCENES} is missing: no scenes there", _REMAKE)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scene]: ...
    def __getitem__(self, index: int | slice) -> Scene | list[Scene]:
        if isinstance(index, slice):
            return [read_scene(path) for path in self._paths[index]]
        return read_scene(self._paths[index])


class ScenesByToken(Mapping[str, Scene]):
    """Scenes by token, without holding those of a ``Scenes``."""

    def __init__(self, scenes: Sequence[Scene], outlines: Sequence[Outline]) -> None:
        self._scenes = scenes
        self._places = {outline.token: place for place, outline in enumerate(outlines)}

    def __getitem__(self, token: str) -> Scene:
        return self._scenes[self._places[token]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
