"""The time of each part of a training step, and the cost of a checkpoint.

    python benchmarks/training.py                            # the demo's data, ranks 1 and 2, with and without caches
    python benchmarks/training.py --ranks 1 --steps 4 --widths 128

Starts the ranks itself; `python -m flows.prepare` must have run in --project. On a CPU every part is CPU time of one
thread, which other work on the machine disturbs little, and which leaves out the time that ranks wait for each other;
on a GPU it is wall time with the device synchronised around each part. Micro-batches are prepared when they are needed,
not by the prefetcher as in training: there "load" and "encode" overlap with the rest and cost a step only what
"loader_wait_seconds" says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

PARTS = ("load", "encode", "forward", "backward", "optimizer", "EMA")
CACHES = {
    "cached": ["latents.live=false", "conditions.maps=cached"],
    "live": ["latents.live=true", "conditions.maps=live"],
}


class OnDemand:
    """Replaces ``Prefetcher``: runs each job when its result is needed."""

    held = 0

    def __init__(self, jobs: Iterator[tuple[int, Callable[[], Any]]], _budget: int) -> None:
        self._jobs = jobs

    def next(self) -> Any:
        _, job = next(self._jobs)
        return job()

    def stop(self) -> None: ...


class Clock:
    """Sums the time of named parts."""

    def __init__(self, device: Any) -> None:
        self._cpu = device.type == "cpu"
        self.spent: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self._cpu:
            return time.thread_time()
        import torch

        torch.accelerator.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.spent[name] += self.now() - started


def steps(options: argparse.Namespace, caches: str) -> dict[str, float]:
    """Measure steps on a rank; return the seconds of each part and the clips of a step."""
    import torch

    from magicdrive_core.model.build import build_stage_network
    from magicdrive_core.parallel.gradient_order import arrival_order
    from magicdrive_core.parallel.mesh import Mesh
    from magicdrive_core.training import loader as loading
    from magicdrive_core.training.engine import build_engine
    from magicdrive_core.training.loop import flow_loss
    from magicdrive_core.training.state import Ema

    config, mesh, device = settings(options, CACHES[caches]), Mesh.of(1), options.device
    torch.manual_seed(0)
    network = build_stage_network(config, options.stage, options.project)
    engine = build_engine(network, config.training, device, arrival_order(network))
    ema, clock = Ema(engine, config.training.ema), Clock(device)
    clips = 0
    with (
        mock.patch.object(loading, "Prefetcher", OnDemand),
        loading.Loader(config, options.stage, options.project) as loader,
    ):
        encoder = loader._latents
        if caches == "live":
            loader._latents = mock.Mock(moments=timed(clock, "encode", encoder.moments))
        loader.start(0, mesh.groups, mesh.group)
        for step in range(options.warmup + options.steps):
            if step == options.warmup:
                clock.spent.clear()
                clips = 0
            with clock.part("load"):
                batch = loader.next()
            with clock.part("forward"):
                losses = flow_loss(engine, batch)
            with clock.part("backward"):
                engine.optimizer.backward(losses.mean())
            with clock.part("optimizer"):
                engine.optimizer.read_passes([losses])
                engine.set_learning_rate(1e-4)
                engine.optimizer.step()
                engine.optimizer.zero_grad()
            with clock.part("EMA"):
                ema.update()
            clips += len(batch.latents)
    clock.spent["load"] -= clock.spent["encode"]  # which is a part of it
    return {part: clock.spent[part] / options.steps for part in PARTS} | {"clips": clips / options.steps}


def timed(clock: Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with clock.part(name):
            return function(*arguments)

    return call


def checkpoints(options: argparse.Namespace, width: int) -> dict[str, float]:
    """Measure a checkpoint of a network of some width on a rank; one artificial step creates the moments."""
    from magicdrive_core.model.build import build_stage_network
    from magicdrive_core.parallel.gradient_order import arrival_order
    from magicdrive_core.training import checkpoints as checkpoint
    from magicdrive_core.training.checkpoints import Saver, TrainingProgress
    from magicdrive_core.training.engine import build_engine
    from magicdrive_core.training.state import Ema

    config = settings(options, [f"model.width={width}"])
    network = build_stage_network(config, options.stage, options.project)
    engine = build_engine(network, config.training, options.device, arrival_order(network))
    engine.optimizer.backward(sum(p.float().sum() for p in network.parameters() if p.requires_grad))
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    ema, clock = Ema(engine, 0.9), Clock(options.device)
    folder = options.folder / str(width)
    with Saver(folder, engine, ema, 1, None) as saver:
        with clock.part("blocked"):
            saver.start(TrainingProgress(step=1))
        before = time.process_time()
        started = time.perf_counter()
        saver.finish()
        background, waited = time.process_time() - before, time.perf_counter() - started
    size = sum(file.stat().st_size for file in (folder / "step-00000001").iterdir())
    with clock.part("load"):
        checkpoint.load(folder / "step-00000001", engine, ema)
    before = time.process_time()
    checkpoint.newest(folder)
    verify = time.process_time() - before
    return {
        "millions": sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        "MB": size / 1e6,
        "blocked": clock.spent["blocked"],
        "background, CPU": background,
        "background, wall": waited,
        "load": clock.spent["load"],
        "verify, CPU": verify,  # in threads
    }


def settings(options: argparse.Namespace, overrides: list[str]) -> Any:
    from magicdrive_core.config.load import load_config

    return load_config(options.params, [*overrides, *options.overrides])


def rank_main(options: argparse.Namespace) -> None:
    """Measure, and write the means over the ranks into a file."""
    import torch
    import torch.distributed as dist

    from magicdrive_core.training.engine import join_group

    torch.set_num_threads(1)
    options.device = join_group(stall_seconds=1800)
    results: dict[str, Any] = {caches: steps(options, caches) for caches in options.caches}
    results["checkpoints"] = {str(width): checkpoints(options, width) for width in options.widths}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        (options.folder / "results.json").write_text(json.dumps(mean_of(everyone)))
    dist.destroy_process_group()


def mean_of(values: list[Any]) -> Any:
    """Return the means of equal trees of numbers."""
    if isinstance(values[0], dict):
        return {key: mean_of([value[key] for value in values]) for key in values[0]}
    return fmean(values)


def show(results: dict[int, dict[str, Any]], caches: list[str]) -> None:
    console = Console(width=120)
    table = Table("ranks", "latents, maps", *PARTS, "s a step", "clips a step and rank", title="seconds of a step")
    for ranks, result in results.items():
        for name in caches:
            parts = [result[name][part] for part in PARTS]
            cells = [f"{part:.3f}" for part in [*parts, sum(parts)]]
            table.add_row(str(ranks), name, *cells, f"{result[name]['clips']:.2f}")
    console.print(table)
    saved = [(ranks, width, row) for ranks, result in results.items() for width, row in result["checkpoints"].items()]
    if saved:
        table = Table("ranks", "width", *saved[0][2], title="checkpoints, seconds; means over the ranks")
        for ranks, width, row in saved:
            table.add_row(str(ranks), width, *(f"{value:.3g}" for value in row.values()))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--set", "-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--stage", default="stage2", choices=["stage1", "stage2", "stage3"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES))
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256], help="of networks to save")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank's results
    options = parser.parse_args()
    if options.folder is not None:
        rank_main(options)
        return
    results = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            command = [*launcher, "--nproc-per-node", str(ranks), *sys.argv, "--folder", folder]
            environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
            subprocess.run(command, check=True, env=os.environ | environment)
            results[ranks] = json.loads((Path(folder) / "results.json").read_text())
    show(results, options.caches)


if __name__ == "__main__":
    main()
