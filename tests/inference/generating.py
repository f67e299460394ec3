"""Workers that generate a small project's items and are killed."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

from magicdrive_core.data.infos import read_scenes
from magicdrive_core.inference.generate import generate_items
from magicdrive_core.inference.items import Item, list_items
from tests.inference.project import STAGE, small_config

CONFIG = small_config("generate.generations=3")


def all_items(project: Path) -> list[Item]:
    return list_items(CONFIG, read_scenes(project / "artifacts/infos"))


def generate(project: Path, out: Path) -> None:
    generate_items(CONFIG, all_items(project), project / STAGE, out, project=project)


def interrupted(project: Path, out: Path, times: int, seconds: float) -> None:
    """Generates, killed several times at a random moment of the first ``seconds``, then undisturbed."""
    context, rng = multiprocessing.get_context("forkserver"), random.Random(11)
    context.set_forkserver_preload(["tests.inference.generating", "diffusers"])
    for _ in range(times):
        worker = context.Process(target=generate, args=(project, out))
        worker.start()
        worker.join(rng.uniform(0.1, seconds))
        worker.kill()
        worker.join()
    worker = context.Process(target=generate, args=(project, out))
    worker.start()
    worker.join(280)
    assert worker.exitcode == 0
