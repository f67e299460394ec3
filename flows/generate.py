"""Flow ``generate``: the validation clips by fan-out.

Run it with ``python -m flows.generate``. ``generate.workers`` children share the items (an item is one generation of
one clip). Items that are finished with these settings and weights are skipped, so a failed shard is simply started
again. With ``generate.task_runner`` dask or ray, Prefect's task runner of that kind places the children on hosts that
share the project's folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner

from flows.common import flow_command, main, no_orphans, run_child, setting_words, tool, unless_interrupted
from magicdrive_core.config.load import load_config
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.errors import UsageError
from magicdrive_core.experiment.run_paths import find_run_paths, pin_registered
from magicdrive_core.inference.items import Item, input_digests, list_items, unfinished
from magicdrive_core.utils.progress import progress_bar

# Prefect's task runners for many hosts: module and class. Ray is an extra: pip install 'magicdrive[ray]'.
RUNNERS = {"dask": ("prefect_dask", "DaskTaskRunner"), "ray": ("prefect_ray", "RayTaskRunner")}


@task(cache_policy=NO_CACHE, task_run_name="shard {shard}", retries=1, retry_condition_fn=unless_interrupted)
def generate_shard(shard: str, settings: list[str], log: Path, project: Path, cores: float = 1.0) -> None:
    """Generates one worker's share of the items in a child process, possibly on another host.

    Args:
        shard: "2/8" for the second of eight workers.
        settings: the options that hand the settings to ``magicdrive generate``.
        log: the file for the child's output.
        project: the project's folder, at the same path on every host.
        cores: share of the host's cores that the child may use, in (0, 1].

    Raises:
        MagicDriveError: the child failed, with its own message; finished items stay.
    """
    threads = max(1, int(len(os.sched_getaffinity(0)) * cores))
    command = [tool("magicdrive"), "generate", "--shard", shard, *settings]
    run_child(command, log, {"OMP_NUM_THREADS": str(threads)}, project)


@flow(name="generate", validate_parameters=False)
def generate(params: str = "params.yaml", overrides: list[str] | None = None) -> str:
    """Generates all validation clips with the last trained stage or with ``generate.weights``.

    Args:
        params: the file of settings.
        overrides: ``key.key=value`` texts.

    Returns:
        The folder of the items.

    Raises:
        MagicDriveError: there are no weights, or a shard failed twice; finished items are kept.
    """
    overrides = [*(overrides or []), *pin_registered(load_config(params, overrides))]
    config = load_config(params, overrides)
    paths = find_run_paths(config)
    items = list_items(config, read_scenes(Path("artifacts/infos")))
    digests = input_digests(config, paths.model.folder)
    missing = unfinished(config, items, paths.generated, digests)
    shards = min(config.generate.workers, len(missing))
    settings = setting_words(params, overrides)
    kind, arguments = config.generate.task_runner, (shards, settings, paths.generated)
    with no_orphans(), _progress(paths.generated, items):
        scheduler = config.generate.scheduler
        cores = 1.0 if scheduler else 1 / max(1, shards)
        if kind == "threads":
            _fan_out(*arguments, cores)
        else:
            runner = _task_runner(kind, scheduler)
            flow(name="shards", task_runner=runner, validate_parameters=False)(_fan_out)(*arguments, cores)
    get_run_logger().info("%d items, %d of them new: %s", len(items), len(missing), paths.generated)
    return str(paths.generated)


def _fan_out(shards: int, settings: list[str], out: Path, cores: float = 1.0) -> None:
    """Runs all shards and waits for them."""
    project = Path.cwd()
    futures = [
        generate_shard.submit(f"{number}/{shards}", settings, project / out / f"shard-{number}.log", project, cores)
        for number in range(1, shards + 1)
    ]
    for future in futures:
        future.wait()  # for all of them, before the first failure is raised: the others finish their work
    for future in futures:
        future.result()


def _task_runner(kind: str, scheduler: str | None) -> TaskRunner[Any]:
    """Makes Prefect's task runner of one kind of ``RUNNERS``.

    Raises:
        UsageError: it is not installed.
    """
    module, name = RUNNERS[kind]
    try:
        runner = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"generate.task_runner {kind}: {error.name} is not installed", f"pip install 'magicdrive[{kind}]'"
        ) from None
    task_runner: TaskRunner[Any] = runner(address=scheduler) if scheduler else runner()
    return task_runner


@contextmanager
def _progress(folder: Path, items: Sequence[Item]) -> Iterator[None]:
    """Shows one progress bar for all shards, which counts the items' folders once a second: they appear complete."""
    finished = threading.Event()
    names = {item.name for item in items}
    with progress_bar() as bar:
        row = bar.add_task("generate", total=len(items))

        def count() -> None:
            running = True
            while running:
                running = not finished.wait(1.0)
                present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
                bar.update(row, completed=len(names & present))

        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        try:
            yield
        finally:
            finished.set()
            counter.join()


if __name__ == "__main__":
    main(flow_command(generate))
