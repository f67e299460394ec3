"""Generated clips that no network made: real mp4 files of small size, and the project that they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import sha256_file
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.item_record import ItemRecord, ViewFile, item_name, video_name

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
HEIGHT, WIDTH = 90, 160
SAMPLES = ("0a" * 16, "1b" * 16)


def config(*overrides: str) -> Config:
    return load_config(
        PROFILE, ["submission.team=owls", "conditions.map_cells={80x144: 200, 96x176: 200, 224x400: 200}", *overrides]
    )


def write_item(
    out: Path,
    sample: str = SAMPLES[0],
    generation: int = 0,
    frames: int = 16,
    scene: str = "scene-token",
    name: str = "scene-0001",
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> ItemRecord:
    """An item of six small videos, or of six pictures where ``frames`` is 1."""
    folder = out / item_name(sample, generation)
    folder.mkdir(parents=True)
    views = {}
    for v, view in enumerate(VIEWS):
        shades = [np.full((*size, 3), 30 * v + 3 * n + 10 * generation, dtype=np.uint8) for n in range(frames)]
        path = folder / video_name(sample, view)
        if frames == 1:
            path = path.with_suffix(".png")
            Image.fromarray(shades[0]).save(path)
            views[view] = ViewFile(path.name, sha256_file(path), path.stat().st_size, None, None)
        else:
            made = encode_video(shades, path, fps=12, max_mbit_s=4.0, preset="ultrafast")
            views[view] = ViewFile(path.name, sha256_file(path), made.bytes, made.mbit_s, made.psnr)
    record = ItemRecord(
        fingerprint=f"{generation:064x}",
        sample=sample,
        scene=scene,
        scene_name=name,
        start=0,
        generated=(frames + 6) // 8 * 8 + 1,
        frames=frames,
        fps=12,
        generation=generation,
        caption="A driving scene image at nowhere. Fog & <owls>.",
        seed=7,
        size="80x144",
        lineage={"model": "ab" * 32, "code": "0.1.0+test"},
        seconds={"sample": 1.0, "decode_and_encode": 2.0},
        views=views,
    )
    record.write(folder)
    return record
