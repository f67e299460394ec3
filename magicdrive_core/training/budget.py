"""The host memory of a stage's micro-batches, and whether they fit, before anything is started. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from magicdrive_core.config.schema import Bucket, Config, Stage, parse_size
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import read_json
from magicdrive_core.utils.memory import memory_left

SLOTS = 100  # box slots of a clip: few clips of nuScenes have more
WAITING_SHARE = 0.1  # of the memory that is left, for micro-batches that wait
MAPS_SHARE = 0.05  # likewise, for maps of scenes, which are read again and again
MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """Host memory that the loader of one rank may hold.

    Attributes:
        left: bytes that the container leaves to each rank of this host.
        waiting: bytes of prepared micro-batches that wait.
        maps: bytes of BEV maps that are kept.
        batches: bytes of a micro-batch, by bucket name.
    """

    left: int
    waiting: int
    maps: int
    batches: dict[str, int]

    @property
    def needed(self) -> int:
        """Bytes needed at least: the largest micro-batch three times, in use, waiting, and while it is prepared."""
        return 3 * max(self.batches.values())


def plan_budget(config: Config, stage: Stage, project: Path = Path(), left: int | None = None) -> Budget:
    """Plan the memory of a stage's loaders.

    Args:
        config: the buckets, and ``training.prefetch_mbytes``.
        stage: to be trained.
        project: the project's folder.
        left: bytes that the container leaves to all ranks of this host; None measures it now.

    Returns:
        What one rank's loader may hold.

    Raises:
        MagicDriveError: the largest micro-batch does not fit, or the encoders are not built.
    """
    each = (memory_left() if left is None else left) // config.cluster.ranks
    chosen = config.training.prefetch_mbytes
    encoders = read_json(project / "artifacts/encoders/encoders.json", "dvc repro encoders")
    channels, text_width = encoders["vae"]["latent_channels"], encoders["text"]["width"]
    batches = {
        bucket.name: batch_bytes(config, bucket, channels, text_width)
        for bucket in config.training.stage(stage).buckets
    }
    waiting = int(WAITING_SHARE * each) if chosen is None else chosen * MIB
    budget = Budget(each, waiting, int(MAPS_SHARE * each), batches)
    if budget.needed > each:
        name = max(batches, key=batches.__getitem__)
        raise MagicDriveError(
            f"{stage}: a micro-batch of {name} takes {batches[name] / 1e9:.2f} GB of host memory, three are held at a"
            f" time, and {each / 1e9:.2f} GB are left for each of {config.cluster.ranks} ranks",
            "reduce its batch or the ranks of this host, or give the container more memory",
        )
    return budget


def batch_bytes(config: Config, bucket: Bucket, latent_channels: int, text_width: int) -> int:
    """Compute the memory of a micro-batch as ``loader.Batch`` holds it, with ``SLOTS`` box slots.

    Args:
        config: cells of the map, tokens of the text, width of the network.
        bucket: size, length and number of the clips.
        latent_channels: channels of the VAE's latents.
        text_width: channels of the text features.

    Returns:
        Bytes.
    """
    height, width = (side // 8 for side in parse_size(bucket.resolution))
    latent_frames = bucket.frames // 4 + bucket.frames % 2
    cells, views = config.conditions.map_cells[bucket.resolution], len(VIEWS)
    latents = 2 * 4 * views * latent_channels * latent_frames * height * width  # clean ones and noise
    maps = bucket.frames * cells * cells  # a bit for each of eight layers
    text = 4 * config.text.max_tokens * text_width
    # Corners and classes are one for all views; masks are for each.
    boxes = bucket.frames * SLOTS * (4 * 8 * 3 + 8 + 8 * views) + 4 * SLOTS * config.model.width
    cameras = 4 * bucket.frames * (views * 21 + 16)
    return bucket.batch * (latents + maps + text + boxes + cameras)
