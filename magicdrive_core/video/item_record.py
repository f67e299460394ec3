"""``item.json``: what stands in the folder of one generated clip, one file a view."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import read_json, sha256_file, sha256_folder, write_json

RECORD = "item.json"


@dataclass(frozen=True)
class ViewFile:
    """One view's file, as measured on it: an mp4, a folder of PNG frames, or a PNG where the clip is a single frame."""

    file: str  # name in the item's folder
    sha256: str
    bytes: int
    mbit_s: float | None  # None: pictures
    psnr: float | None  # dB, decoded against the frames that were encoded; None: lossless

    @classmethod
    def of_pictures(cls, path: Path) -> ViewFile:
        """A PNG, or a folder of them."""
        return cls(path.name, *_digest_and_bytes(path), None, None)


@dataclass(frozen=True)
class ItemRecord:
    """Where a generated clip came from, and its files by view."""

    fingerprint: str  # of everything that decides the pixels
    sample: str  # token of the clip's first sample
    scene: str  # scene token
    scene_name: str
    start: int  # first frame in the scene
    generated: int  # frames of the clip, given ones included
    frames: int  # frames in each file
    fps: int
    generation: int
    caption: str
    seed: int
    size: str  # HEIGHTxWIDTH as sampled
    lineage: dict[str, str]  # digests of model, encoders and data, versions of computations
    seconds: dict[str, float]  # wall time by part of the work
    views: dict[str, ViewFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The item's name, which is also its folder's."""
        return item_name(self.sample, self.generation)

    def write(self, folder: Path) -> None:
        """Writes the record into the item's folder."""
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> ItemRecord:
        """Reads the record of an item's folder.

        Raises:
            MagicDriveError: there is none, or it is of another form.
        """
        values: dict[str, Any] = read_json(folder / RECORD, "run magicdrive generate")
        try:
            views = {view: ViewFile(**entry) for view, entry in values.pop("views").items()}
            return cls(**values, views=views)
        except (TypeError, KeyError, AttributeError) as error:
            raise MagicDriveError(
                f"{folder / RECORD} is not an item's record: {error}", "delete the folder and generate again"
            ) from None

    def faults(self, folder: Path) -> list[str]:
        """What is wrong with the item's files: missing, or not the bytes that were written."""
        out = []
        for view, entry in self.views.items():
            path = folder / entry.file
            if not path.exists():
                out.append(f"{view}: {path} is missing")
            elif _digest_and_bytes(path) != (entry.sha256, entry.bytes):
                out.append(f"{view}: {path} is not the file that was written")
        return out


def _digest_and_bytes(path: Path) -> tuple[str, int]:
    if path.is_dir():
        return sha256_folder(path), sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sha256_file(path), path.stat().st_size


def item_name(sample: str, generation: int) -> str:
    """W-CODA's name of a generated clip: ``{first sample token}_gen{generation}``."""
    return f"{sample}_gen{generation}"


def video_name(sample: str, view: str) -> str:
    """W-CODA's name of one view's file: ``{first sample token}_{VIEW}.mp4``."""
    return f"{sample}_{view}.mp4"


def read_items(folder: Path) -> list[ItemRecord]:
    """The records of all finished items below ``folder``, by name."""
    return [ItemRecord.read(path.parent) for path in sorted(folder.glob(f"*/{RECORD}"))]
