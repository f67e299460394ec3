"""How long ranks wait for each other: the published order of micro-batches, and groups of similar cost.

    python benchmarks/buckets.py                       # stages 2 and 3 of the nuscenes profile, 8 and 32 ranks
    python benchmarks/buckets.py --scenes 70 --costs costs.json   # measured by step_costs.py

The order uses computed costs (``relative_cost``), as in training. The waiting time uses the measured costs if there are
any, else the computed ones. Clips: scenes of 220 frames, every start frame, forty key frames in each scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import STAGES, Bucket
from magicdrive_core.data.buckets import BucketSampler, idle_share, relative_cost
from magicdrive_core.utils.files import read_json

PROFILE = Path(__file__).resolve().parents[1] / "profiles/nuscenes.yaml"
FRAMES, KEY_FRAMES = 220, 40


def clips_of_a_scene(bucket: Bucket) -> int:
    """Return the number of clips of a bucket that one scene has in an epoch."""
    if bucket.whole:
        return bucket.repeat
    return KEY_FRAMES if bucket.frames == 1 else max(0, FRAMES - bucket.frames + 1)


def main() -> None:
    """Print the idle share of both orders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=700)
    parser.add_argument("--costs", type=Path, help="of step_costs.py: seconds a clip by bucket name")
    arguments = parser.parse_args()
    measured = read_json(arguments.costs) if arguments.costs else None
    config = load_config(PROFILE)
    table = Table("stage", "ranks", "idle, published order", "idle, groups of similar cost")
    for stage in STAGES[1:]:
        buckets = config.training.stage(stage).buckets
        counts = [arguments.scenes * clips_of_a_scene(bucket) for bucket in buckets]
        costs = [
            relative_cost(b.resolution, b.frames, b.batch, config.model.width, config.text.max_tokens) for b in buckets
        ]
        spent = [bucket.batch * measured[bucket.name] for bucket in buckets] if measured else costs
        for ranks in (8, 32):
            shares = []
            for group in (1, ranks):
                sampler = BucketSampler(counts, [b.batch for b in buckets], 1, 0, seed=1024, costs=costs, group=group)
                shares.append(idle_share(sampler.order(0), spent, ranks))
            table.add_row(stage, str(ranks), *(f"{share:.1%}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
