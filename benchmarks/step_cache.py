"""Time saved and error made by generate.step_cache, on a project's trained network.

    python benchmarks/step_cache.py --project . --within 20 40 80

Samples the first validation clip with ``--steps`` steps, without the cache and with each setting, from the same noise.
For each it prints the number of steps that ran the blocks, the CPU time relative to sampling without the cache, the
root mean square difference of the latents in standard deviations, and the PSNR of the frames of one view.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import chosen_edits
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import SingleProcess
from magicdrive_core.inference.sampler import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--run", type=Path, help="a finished stage; by default the last one of the project's settings")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--within", type=float, nargs="+", default=[20.0, 40.0, 80.0])
    arguments = parser.parse_args()
    project = arguments.project
    overrides = [f"generate.steps={arguments.steps}", f"generate.frames={arguments.frames}"]
    config = load_config(project / "params.yaml", overrides)
    scenes = read_scenes(project / "artifacts/infos")
    item = list_items(config, scenes, project)[0]
    models = Models.load(config, arguments.run or find_run_paths(config, project=project).model.folder, project)
    passed: list[int] = []
    models.network.base_blocks_s[0].register_forward_hook(lambda *_: passed.append(1))
    scene = next(scene for scene in scenes if scene.token == item.clip.scene)
    sampler = Sampler(config, models, item, scene, chosen_edits(config, project), BevMaps(config, project))

    def sample(within: float | None) -> tuple[Tensor, int, float]:
        passed.clear()
        began = time.process_time()
        (latents,) = replace(sampler, config=_with_cache(config, within)).sample(SingleProcess())
        return latents, len(passed) // 2, time.process_time() - began  # guidance passes them twice

    def view(latents: Tensor) -> np.ndarray:
        return np.concatenate([group[0] for group in models.vae.decode(latents[1:2])]).astype(float)

    exact, steps, seconds = sample(None)
    print(f"without: {steps} steps, {seconds:.1f} s of CPU time")
    for within in arguments.within:
        near, steps, took = sample(within)
        error = float((near - exact).square().mean().sqrt() / exact.std())
        psnr = 10 * np.log10(255**2 / np.square(view(near) - view(exact)).mean())
        print(f"within {within:g}: {steps} steps, {took / seconds:.2f} of the time, error {error:.3f}, {psnr:.1f} dB")


def _with_cache(config: Config, within: float | None) -> Config:
    return config.model_copy(update={"generate": config.generate.model_copy(update={"step_cache": within})})


if __name__ == "__main__":
    main()
