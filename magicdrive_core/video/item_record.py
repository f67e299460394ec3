"""The record of a generated clip (``item.json``): where it came from, and its files, one for each view."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import file_name, read_json, sha256_file, sha256_folder, write_json

RECORD = "item.json"


@dataclass(frozen=True)
class ViewFile:
    """One view's file as measured: an mp4, a folder of PNG frames, or one PNG if the clip is a single frame.

    Attributes:
        file: name in the item's folder.
        sha256: hex digest of the file, or of the folder's files and names.
        bytes: size.
        mbit_s: bit rate of an mp4 in Mbit/s; None: PNG.
        psnr: dB of the decoded frames against the encoded ones; None: lossless.
    """

    file: str
    sha256: str
    bytes: int
    mbit_s: float | None
    psnr: float | None

    @classmethod
    def of_images(cls, path: Path) -> ViewFile:
        """Measures a PNG file, or a folder of PNG files.

        Args:
            path: the file or the folder; it lies in the item's folder, because only its name is kept.

        Returns:
            The measured file; ``mbit_s`` and ``psnr`` are None.
        """
        return cls(path.name, *_digest_and_bytes(path), None, None)


@dataclass(frozen=True)
class ItemRecord:
    """Where a generated clip came from, and its files by view.

    Attributes:
        fingerprint: of everything that decides the pixels.
        sample: token of the clip's first sample.
        scene: scene token.
        scene_name: name of the scene.
        start: first frame of the clip in the scene.
        generated: frames of the clip, initial frames included.
        frames: frames in each file.
        fps: frames per second.
        generation: number of the generation, from 0.
        caption: text that the clip was conditioned on.
        seed: seed of the clip's noise.
        size: HEIGHTxWIDTH as sampled.
        lineage: by name, digests of model, encoders and data, and the versions of computations.
        seconds: wall time, by part of the work.
        views: the files, by view.
    """

    fingerprint: str
    sample: str
    scene: str
    scene_name: str
    start: int
    generated: int
    frames: int
    fps: int
    generation: int
    caption: str
    seed: int
    size: str
    lineage: dict[str, str]
    seconds: dict[str, float]
    views: dict[str, ViewFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the item and of its folder: ``{first sample token}_gen{generation}`` (``item_name``)."""
        return item_name(self.sample, self.generation)

    def write(self, folder: Path) -> None:
        """Writes the record as ``item.json``.

        Args:
            folder: the item's folder.
        """
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> ItemRecord:
        """Reads the record of an item from ``item.json``.

        Args:
            folder: the item's folder.

        Returns:
            The record; its files are not checked (see ``faults``).

        Raises:
            MagicDriveError: the record is missing or has another format.
        """
        values: dict[str, Any] = read_json(folder / RECORD, "run magicdrive generate")
        try:
            views = {view: ViewFile(**entry) for view, entry in values["views"].items()}
            cls(**(values | {"views": views}))  # refuses unknown fields
            record = _adapter().validate_json(json.dumps(values), strict=True)
            if set(record.views) != set(VIEWS):
                raise ValueError(f"its views are {', '.join(record.views) or 'none'}, not the six cameras")
            for entry in record.views.values():
                if Path(entry.file).name != entry.file or "\0" in entry.file:
                    raise ValueError(f"{entry.file!r} is not the name of a file in its folder")
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise MagicDriveError(
                f"{folder / RECORD} is not the record of an item: {reason}", "delete the folder and generate again"
            ) from None
        return record

    def faults(self, folder: Path) -> list[str]:
        """Describes the item's files that are missing or have changed since they were written, by digest and size.

        Args:
            folder: the item's folder.

        Returns:
            One line for each such file; an empty list if all files are as recorded.
        """
        out = []
        for view, entry in self.views.items():
            path = folder / entry.file
            if not path.exists():
                out.append(f"{view}: {path} is missing")
            elif _digest_and_bytes(path) != (entry.sha256, entry.bytes):
                out.append(f"{view}: {path} has changed since it was written")
        return out


@cache
def _adapter() -> TypeAdapter[ItemRecord]:
    return TypeAdapter(ItemRecord)


def _digest_and_bytes(path: Path) -> tuple[str, int]:
    if path.is_dir():
        return sha256_folder(path), sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sha256_file(path), path.stat().st_size


def item_name(sample: str, generation: int) -> str:
    """Returns W-CODA's name of a generated clip: ``{first sample token}_gen{generation}``.

    Args:
        sample: token of the clip's first sample.
        generation: number of the generation, from 0.
    """
    return f"{file_name(sample)}_gen{generation}"


def video_name(sample: str, view: str) -> str:
    """Returns W-CODA's name of one view's file: ``{first sample token}_{VIEW}.mp4``.

    Args:
        sample: token of the clip's first sample.
        view: one of ``cameras.VIEWS``, such as ``CAM_FRONT``.
    """
    return f"{file_name(sample)}_{view}.mp4"


def read_items(folder: Path) -> list[ItemRecord]:
    """Reads the records of all finished items of a folder.

    Args:
        folder: the folder that holds the items' folders; those without ``item.json`` are not finished and are left out.

    Returns:
        The records, sorted by folder name; none if the folder is missing.

    Raises:
        MagicDriveError: a record has another format.
    """
    return [ItemRecord.read(path.parent) for path in sorted(folder.glob(f"*/{RECORD}"))]
