"""How long ranks wait for each other: the published order of micro-batches, and groups of like cost.

    python benchmarks/buckets.py                       # stages 2 and 3 of the nuscenes profile, 8 and 32 ranks
    python benchmarks/buckets.py --scenes 70

Costs are arithmetic (``relative_cost``): multiply-adds of the network's blocks. Clips: scenes of 220 frames, every
start frame, forty key frames a scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from magicdrive_core.config import STAGES
from magicdrive_core.data.buckets import BucketSampler, idle_share, relative_cost
from magicdrive_core.settings import load_config

PROFILE = Path(__file__).resolve().parents[1] / "profiles/nuscenes.yaml"
FRAMES, KEY_FRAMES = 220, 40


def main() -> None:
    """Prints the idle share of both orders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=700)
    scenes = parser.parse_args().scenes
    config = load_config(PROFILE)
    table = Table("stage", "ranks", "idle, published order", "idle, groups of like cost")
    for stage in STAGES[1:]:
        buckets = config.training.stage(stage).buckets
        counts = [scenes * (KEY_FRAMES if b.frames == 1 else max(0, FRAMES - b.frames + 1)) for b in buckets]
        costs = [relative_cost(b.size, b.frames, b.batch, config.model.width, config.text.max_tokens) for b in buckets]
        for ranks in (8, 32):
            shares = []
            for group in (1, ranks):
                sampler = BucketSampler(counts, [b.batch for b in buckets], 1, 0, seed=1024, costs=costs, group=group)
                shares.append(idle_share(sampler.order(0), costs, ranks))
            table.add_row(stage, str(ranks), *(f"{share:.1%}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
