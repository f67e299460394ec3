"""Which items are done: their fingerprint, their bytes and a look into each of their files agree. No torch.

Every video was decoded whole when it was written (its PSNR is measured so), and its digest taken then. Equal bytes
decode equally; the look into the files is for records that came by wrong digests, and for another host's decoder.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.video.decoder import probe
from magicdrive_core.video.frames import frame_files, read_frame
from magicdrive_core.video.record import RECORD, ItemRecord

_SIZE = (PICTURE_HEIGHT, PICTURE_WIDTH)


def is_done(folder: Path, wanted: str) -> bool:
    """Whether the item's folder holds files of exactly this fingerprint, as they were written, that can be decoded."""
    if not (folder / RECORD).is_file():
        return False
    try:
        record = ItemRecord.read(folder)
        return record.fingerprint == wanted and not record.faults(folder) and _opens(record, folder)
    except MagicDriveError:
        return False


def _opens(record: ItemRecord, folder: Path) -> bool:
    """Whether each view has the record's frames, at its rate and in full size, and its first frame can be decoded.

    Raises:
        MagicDriveError: a file cannot be read.
    """
    paths = [folder / entry.file for entry in record.views.values()]
    with ThreadPoolExecutor(len(paths)) as pool:  # decoding leaves the interpreter to the others
        return all(pool.map(partial(_view_opens, record), paths))


def _view_opens(record: ItemRecord, path: Path) -> bool:
    if path.suffix == ".mp4":
        info = probe(path, first_frame=True)
        return (info.frames, info.fps, (info.height, info.width)) == (record.frames, record.fps, _SIZE)
    files = frame_files(path) if path.is_dir() else [path]
    return len(files) == record.frames and read_frame(files[0]).shape == (*_SIZE, 3)
