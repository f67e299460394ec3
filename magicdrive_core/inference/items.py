"""Which clips are generated, what decides their pixels, and which are done already. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import magicdrive_core
from magicdrive_core.config import Config, fingerprint
from magicdrive_core.data.edits import chosen_edits
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import read_json, sha256_file
from magicdrive_core.tracking import lineage
from magicdrive_core.video.record import RECORD, ItemRecord, item_name

# Source that turns params and weights into pixels; all other inputs enter an item's fingerprint by their digests.
_CODE = (
    "data/conditions.py",
    "encoders",
    "geometry",
    "inference",
    "model",
    "rectified_flow.py",
    "video/colour.py",
    "video/encoder.py",
    "video/frames.py",
    "video/rate_search.py",
    "video/spool.py",
)


@dataclass(frozen=True)
class Item:
    """One clip, generated once."""

    clip: Clip
    generation: int
    name: str  # and its folder's: {first sample token}_gen{generation}
    kept: int  # frames that are written of the clip's 8n+1


def list_items(config: Config, scenes: Sequence[Scene]) -> list[Item]:
    """Every validation scene's first clip, ``generate.generations`` times.

    A clip has ``generate.frames`` frames, or the most 8n+1 that a shorter scene has. The last frame of W-CODA's 17 is
    there only because a clip has 8n+1: it is not written.

    Raises:
        MagicDriveError: no scene is for validation.
    """
    chosen = [scene for scene in scenes if scene.split in ("val", "both")]
    if not chosen:
        raise MagicDriveError("no scene is for validation", "name some in data.val_scenes")
    items = []
    for scene in chosen:
        frames = min(config.generate.frames, (len(scene) - 1) // 8 * 8 + 1)
        wanted = config.benchmark.frames
        kept = wanted if wanted <= frames < wanted + 8 else frames
        clip = Clip(scene.token, 0, frames)
        items += [
            Item(clip, generation, item_name(scene.first_sample, generation), kept)
            for generation in range(config.generate.generations)
        ]
    return items


def input_digests(config: Config, stage_folder: Path, project: Path = Path()) -> dict[str, str]:
    """Digests of everything that an item is made from, by name: weights, DVC stages' outputs, source code, edits.

    Raises:
        MagicDriveError: the stage is not trained.
    """
    run = read_json(stage_folder / "run.json", "train the stage first: magicdrive train")
    data = {Path(path).name: digest for path, digest in lineage.input_digests(project).items()}
    data.pop("latents")  # training's own
    return {
        "model": run["weights_sha256"],
        "code": code_version(),
        "edits": chosen_edits(config, project).digest,
        **data,
    }


def item_seed(config: Config, item: Item) -> int:
    """The seed of an item's noise, the same in any order, on any worker and host."""
    return int(fingerprint(config.generate.seed, asdict(item.clip), item.generation)[:15], 16)


def item_fingerprint(config: Config, item: Item, digests: Mapping[str, str]) -> str:
    """Changes with everything that decides the item's files.

    Args:
        config: sampling, video and framing settings are taken from it.
        item: what is generated.
        digests: of the inputs, as ``input_digests`` gives them.
    """
    return fingerprint(_settings(config), asdict(item), dict(digests))


def is_done(folder: Path, wanted: str) -> bool:
    """Whether the item's folder holds files of exactly this fingerprint, byte for byte as they were written."""
    if not (folder / RECORD).is_file():
        return False
    try:
        record = ItemRecord.read(folder)
    except MagicDriveError:
        return False
    return record.fingerprint == wanted and not record.faults(folder)


@lru_cache
def code_version() -> str:
    """The package's version and a digest of the source that makes pixels."""
    root = Path(magicdrive_core.__file__).parent
    digest = hashlib.sha256()
    for part in _CODE:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    return f"{version('magicdrive')}+{digest.hexdigest()[:12]}"


def _settings(config: Config) -> dict[str, Any]:
    """The settings that decide the pixels of an item that is given; how many items there are does not."""
    sampling = config.generate.model_dump(
        mode="json", exclude={"workers", "sequence_parallel", "generations", "frames", "weights", "offload", "edits"}
    )
    if config.published:  # whose pictures depend on the padding (decision 0003, oddity 8)
        sampling["pad_patches"] = config.generate.pad_patches or config.generate.sequence_parallel
    others = {"video": config.video, "flow": config.flow}
    return {"sampling": sampling, "published": config.published} | {
        name: section.model_dump(mode="json") for name, section in others.items()
    }
