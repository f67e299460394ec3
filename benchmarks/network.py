"""How fast the network is on this machine, in seconds and in matrix-product equivalents.

    python benchmarks/network.py                                   # workload W in fp32, two threads: about 3 minutes
    python benchmarks/network.py --threads 1 --parts forward
    python benchmarks/network.py --parts sampling --steps 30 --repeat 3

Workload W: width 384, 6 heads, depth 6, control depth 3, one sample of six views and 17 frames at 224x400 (latents
5x28x50), 64 text tokens x 512 of which 41 are the prompt's, 32 box slots.

A matrix-product equivalent is the time of one 2048 x 2048 x 2048 matrix product of torch in the same process, taken
before and after each part. It makes runs on one machine comparable while other work slows it down. It does not travel
between machines: compare networks only within one run on one machine. A time is the least of several.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from magicdrive_core.diffusion.rectified_flow import RectifiedFlow
from magicdrive_core.inference.guided_sampling import sample_latents
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import Conditions, pack_map
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.utils.memory import keep_freed

aten, own = torch.ops.aten, torch.ops.magicdrive
PRODUCT = 2048
PRODUCT_FLOP = 2 * PRODUCT**3
LATENTS = (5, 28, 50)


def packed_flop(packed: Sequence[int], count: int, products: int) -> int:
    """Counts the FLOP of packed attention to ``count`` tokens.

    Args:
        packed: (outer, inner, n, 3, h, d).
        count: attended tokens.
        products: matrix products of queries and keys: attention has two, its backward pass five.
    """
    outer, inner, tokens, _, heads, d = packed
    return products * 2 * outer * inner * tokens * count * heads * d


def context_flop(q: Sequence[int], kv: Sequence[int], products: int) -> int:
    """Counts the FLOP of attention of q (R, n, h, d) to kv (R, m, 2, h, d); ``products`` as of ``packed_flop``."""
    return products * 2 * prod(q) * kv[1]


# What torch's own count leaves out: attention on a CPU, the C++ kernels, and sums into a product's result.
UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
    own.attend_packed: lambda packed, norm, count, *_, **__: packed_flop(packed, count, 2),
    own.attend_packed_backward: lambda gradient, packed, norm, count, *_, **__: packed_flop(packed, count, 5),
    own.attend_neighbours: lambda packed, norm, count, neighbours, **_: (
        len(neighbours) * packed_flop((packed[0], *packed[2:]), count, 2)
    ),
    own.attend_neighbours_backward: lambda gradient, packed, norm, count, neighbours, **_: (
        len(neighbours) * packed_flop((packed[0], *packed[2:]), count, 5)
    ),
    own.attend_context: lambda q, kv, *_, **__: context_flop(q, kv, 2),
    own.attend_context_backward: lambda gradient, q, kv, *_, **__: context_flop(q, kv, 5),
    aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1],
    own.modulated_linear: lambda x, shift, scale, weight, *_, **__: 2 * prod(x[:-1]) * weight[0] * weight[1],
    own.mlp: lambda x, shift, scale, up, *_, **__: 4 * prod(x[:-1]) * up[0] * up[1],
}
FRAMES, SLOTS, TOKENS, KEPT = 17, 32, 64, 41

W = NetworkConfig(
    width=384,
    depth=6,
    heads=6,
    control_depth=3,
    ego_heads=6,
    box_heads=6,
    box_widths=(384, 256, 256),
    map_channels=(16, 32, 96, 256),
    latent_channels=16,
    text_width=512,
    text_tokens=TOKENS,
    temporal=True,
    instance_latent=True,
    mean_over_frames=False,
)


@dataclass(frozen=True)
class Timing:
    """Least time of one part, and of a matrix product beside it."""

    part: str
    seconds: float
    product: float
    flop: float
    peak_gb: float

    @property
    def product_equivalents(self) -> float:
        """Time in multiples of the matrix product's."""
        return self.seconds / self.product

    @property
    def of_rate(self) -> float:
        """Share of the product's FLOP/s that the part reaches."""
        return self.flop / PRODUCT_FLOP / self.product_equivalents


def workload(seed: int = 0) -> Conditions:
    """Conditions of the sizes of W, without meaning."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    return Conditions(
        text=normal(1, TOKENS, 512),
        text_mask=torch.arange(TOKENS)[None] < KEPT,
        cameras=normal(1, 6, FRAMES, 3, 7),
        ego_motion=normal(1, FRAMES, 4, 4),
        box_corners=20 * normal(1, 6, FRAMES, SLOTS, 8, 3),
        box_classes=whole(0, 10, 1, 6, FRAMES, SLOTS),
        box_masks=whole(-1, 2, 1, 6, FRAMES, SLOTS),
        bev_map=pack_map(whole(0, 2, 1, FRAMES, 8, 200, 200)),
        height=torch.tensor([224.0]),
        width=torch.tensor([400.0]),
        fps=torch.tensor([12.0]),
        keep=torch.ones(1, dtype=torch.bool),
        keep_frame=torch.ones(1, FRAMES, dtype=torch.bool),
        box_latent=normal(1, SLOTS, W.width),
    )


def least(run: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of several runs; with one thread CPU time, which other work disturbs less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeat):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times)


def product_time(dtype: torch.dtype) -> float:
    a, b = torch.randn(2, PRODUCT, PRODUCT).to(dtype).unbind(0)
    return least(lambda: a @ b, 5)


class PeakMemory:
    """Highest resident memory of the process since it was made, in GB (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9


def count(run: Callable[[], object]) -> float:
    """FLOP of a run, which also warms it up. Not for a compiled one, or one with threads: their operations hide."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        run()
    return counter.get_total_flops()


def measure(
    part: str, run: Callable[[], object], repeat: int, dtype: torch.dtype, flop: float, *, warm: bool = False
) -> Timing:
    """``warm``: as it is; else it is run once before, which compiles it where it is to be."""
    before = product_time(dtype)
    if not warm:
        run()
    gc.collect()
    memory = PeakMemory()
    seconds = least(run, repeat)
    peak = memory.read()
    return Timing(part, seconds, min(before, product_time(dtype)), flop, peak)


def timings(parts: list[str], dtype: torch.dtype, compiled: bool, repeat: int, steps: int) -> Iterator[Timing]:
    network = build_network(W).to(dtype)
    conditions = workload()
    x = torch.randn(1, 6, W.latent_channels, *LATENTS)
    t = torch.tensor([500.0])
    forward = torch.compile(network, fullgraph=True) if compiled else network

    def train(forward: Callable[..., Tensor]) -> None:
        network.zero_grad(set_to_none=True)
        forward(x, t, conditions).square().mean().backward()

    @torch.no_grad()
    def infer() -> Tensor:
        return forward(x, t, conditions)

    @torch.no_grad()
    def denoise() -> Tensor:
        return network.denoise(x, t, context)

    keep_freed()  # as generation does on a CPU
    parallelize(network)
    network.requires_grad_(False)
    if "forward" in parts or "sampling" in parts:
        with torch.no_grad():
            context = network.encode(conditions, LATENTS)
            forward_flop = count(lambda: network(x, t, conditions))
        denoise_flop = count(denoise)
    if "forward" in parts:
        yield measure("forward", infer, repeat, dtype, forward_flop, warm=not compiled)
        yield measure("denoise only", denoise, repeat, dtype, denoise_flop, warm=True)
    if "sampling" in parts:
        settings = {"steps": steps, "guidance": 2.0, "flow": RectifiedFlow()}
        draw = torch.Generator().manual_seed(0)
        sampling = partial(sample_latents, network, conditions, LATENTS, generator=draw, **settings)
        flop = 2 * (forward_flop + (steps - 1) * denoise_flop)
        yield measure(f"{steps} guided steps", sampling, 1, dtype, flop, warm=True)
    context = None  # a training step keeps none
    network.requires_grad_(True)
    if "backward" in parts:
        for part, checkpointed in (("forward + backward", 0), ("the same, checkpointed", 1)):
            parallelize(network, recompute_every=checkpointed)
            flop = count(partial(train, network))
            yield measure(part, partial(train, forward), repeat, dtype, flop, warm=not compiled)


def show(rows: Iterable[Timing]) -> None:
    """Prints the table as it grows."""
    table = Table("part", "seconds", "product equivalents", "share of the product's rate", "peak GB")
    for row in rows:
        values = [f"{row.seconds:.2f}", f"{row.product_equivalents:.1f}", f"{row.of_rate:.0%}", f"{row.peak_gb:.1f}"]
        table.add_row(row.part, *values)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) for forward and backward")
    parser.add_argument("--repeat", type=int, default=1, help="runs of a part after the one that warms it up")
    parser.add_argument("--steps", type=int, default=3, help="steps of guided sampling")
    choices = ["forward", "backward", "sampling"]
    parser.add_argument("--parts", nargs="+", choices=choices, default=choices, help="what to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = timings(options.parts, getattr(torch, options.dtype), options.compile, options.repeat, options.steps)
    show(rows)


if __name__ == "__main__":
    main()
