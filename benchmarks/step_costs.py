"""The measured cost of a clip of each bucket in training: forward and backward, CPU seconds of one thread.

    python benchmarks/step_costs.py costs.json                  # the buckets of stages 2 and 3 of the nuscenes profile
    python benchmarks/buckets.py --costs costs.json

The network is the published XL one at half of every length: a quarter of a frame's tokens, of the width, of the text
and of the map, so that linear layers, attention and convolutions keep their shares; it has two blocks, one control
block, and activation checkpointing. A micro-batch costs the sum of its clips. Buckets that the file already has are not
measured again, so that a long measurement can be made in parts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import STAGES, parse_size
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import Conditions
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.utils.files import read_json, write_json

PROFILE = Path(__file__).resolve().parents[1] / "profiles/nuscenes.yaml"
SHRINK = 4  # of what grows with the square of a length: tokens, width, text
SLOTS, TEXT_WIDTH = 24, 1024
NETWORK = NetworkConfig(
    width=1152 // SHRINK,
    depth=2,
    heads=16 // SHRINK,
    control_depth=1,
    ego_heads=2,
    box_heads=2,
    box_widths=(1152 // SHRINK, 512 // SHRINK, 512 // SHRINK),
    map_channels=(4, 8, 24, 64),
    latent_channels=16,
    text_width=TEXT_WIDTH,
    text_tokens=300 // SHRINK,
    temporal=True,
    instance_latent=True,
    mean_over_frames=False,
)


def conditions(size: str, frames: int, cells: int) -> Conditions:
    """Return random conditions of one clip."""
    draw = torch.Generator().manual_seed(0)
    height, width = parse_size(size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    return Conditions(
        text=normal(1, 300 // SHRINK, TEXT_WIDTH),
        text_mask=torch.ones(1, 300 // SHRINK, dtype=torch.bool),
        cameras=normal(1, 6, frames, 3, 7),
        ego_motion=normal(1, frames, 4, 4),
        box_corners=20 * normal(1, 6, frames, SLOTS, 8, 3),
        box_classes=torch.zeros(1, 6, frames, SLOTS, dtype=torch.int64),
        box_masks=torch.ones(1, 6, frames, SLOTS, dtype=torch.int64),
        bev_map=torch.full((1, frames, cells // 2, cells // 2), 255, dtype=torch.uint8),
        height=torch.tensor([float(height)]),
        width=torch.tensor([float(width)]),
        fps=torch.tensor([12.0]),
        keep=torch.ones(1, dtype=torch.bool),
        keep_frame=torch.ones(1, frames, dtype=torch.bool),
        box_latent=normal(1, SLOTS, NETWORK.width),
    )


def clip_seconds(network: MagicDrive, size: str, frames: int, cells: int) -> float:
    """Return the CPU seconds of one training step on one clip, without the optimizer, which costs the same for all."""
    inputs = conditions(size, frames, cells)
    height, width = (side // 16 for side in parse_size(size))  # latents at half of the length
    x = torch.randn(1, 6, NETWORK.latent_channels, (frames - 1) // 4 + 1, height, width)
    network.zero_grad(set_to_none=True)
    started = time.process_time()
    network(x, torch.tensor([500.0]), inputs).square().mean().backward()
    return time.process_time() - started


def main() -> None:
    """Write seconds a clip by bucket name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", type=int, default=217, help="frames of a whole scene")
    parser.add_argument("--stages", nargs="+", choices=STAGES[1:], default=STAGES[1:], help="whose buckets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(PROFILE)
    network = build_network(NETWORK)
    parallelize(network, recompute_every=1)
    buckets = {
        (bucket.resolution, options.whole if bucket.whole else bucket.frames): bucket.name
        for stage in options.stages
        for bucket in config.training.stage(stage).buckets
    }
    costs: dict[str, float] = read_json(options.out) if options.out.is_file() else {}
    clip_seconds(network, "224x400", 1, 200)  # warm-up
    for (size, frames), name in sorted(buckets.items(), key=lambda item: (parse_size(item[0][0]), item[0][1])):
        if name in costs:
            continue
        runs = 3 if frames <= 9 else 1
        cells = config.conditions.map_cells[size]
        costs[name] = min(clip_seconds(network, size, frames, cells) for _ in range(runs))
        print(f"{name:14} {costs[name]:8.2f} s", flush=True)
        write_json(options.out, costs)


if __name__ == "__main__":
    main()
