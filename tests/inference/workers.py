"""Workers that share items and write grey images in a few milliseconds instead of running a network."""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from zlib import crc32

from PIL import Image

from magicdrive_core.data.records import Clip
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH, VIEWS
from magicdrive_core.inference.claims import Claim
from magicdrive_core.inference.fan_out import Summary, share_items
from magicdrive_core.inference.items import Item
from magicdrive_core.utils.files import atomic_folder
from magicdrive_core.video.item_record import ItemRecord, ViewFile, item_name


def items(count: int) -> list[Item]:
    return [Item(Clip(f"scene{n}", 0, 1), 0, item_name(f"sample{n}", 0), 1) for n in range(count)]


def write(out: Path, item: Item, seconds: float = 0.0) -> None:
    """Writes an item's folder whose bytes depend only on its name."""
    sample = item.name.removesuffix("_gen0")
    with atomic_folder(out / item.name) as folder:
        picture = BytesIO()
        shade = crc32(item.name.encode()) % 256
        Image.new("L", (PICTURE_WIDTH, PICTURE_HEIGHT), shade).save(picture, "png", compress_level=1)
        time.sleep(seconds)
        views = {}
        for view in VIEWS:
            path = folder / f"{sample}_{view}.png"
            path.write_bytes(picture.getvalue())
            views[view] = ViewFile.of_images(path)
        clip = item.clip
        ItemRecord(
            item.name, sample, clip.scene, clip.scene, 0, 1, 1, 12, 0, "a street", 7, "32x64", {}, {}, views
        ).write(folder)


def finished() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def work(out: Path, count: int, seconds: float, shard: tuple[int, int] = (0, 1)) -> Summary:
    """Runs one worker, which adds a line to ``out/started`` for each item that it starts."""

    def make(item: Item, _: Claim) -> Future[None]:
        with (out / "started").open("a") as log:
            log.write(f"{item.name}\n")
        write(out, item, random.uniform(0, 2 * seconds))
        return finished()

    return share_items(items(count), out, lambda item: item.name, make, shard=shard, wait=lambda _: time.sleep(0.02))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), (int(sys.argv[4]), int(sys.argv[5])))
