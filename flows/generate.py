"""Flow ``generate``: the validation clips by fan-out.

    python -m flows.generate

``generate.workers`` children share the items (one clip x one generation each). An item that is done with these
settings and weights is skipped, so that a shard that failed is simply started again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.common import flow_command, main, no_orphans, run_child, setting_words, tool, unless_interrupted
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.inference.items import input_digests, is_done, item_fingerprint, list_items
from magicdrive_core.places import find_places
from magicdrive_core.progress import progress_bar
from magicdrive_core.settings import load_config
from magicdrive_core.video.record import RECORD


@task(cache_policy=NO_CACHE, task_run_name="shard {shard}", retries=1, retry_condition_fn=unless_interrupted)
def generate_shard(shard: str, settings: list[str], log: Path) -> None:
    """One child's share of the items and of the cores: ``shard`` is "2/8" for the second of eight."""
    threads = max(1, len(os.sched_getaffinity(0)) // int(shard.split("/")[1]))
    run_child([tool("magicdrive"), "generate", "--shard", shard, *settings], log, {"OMP_NUM_THREADS": str(threads)})


@flow(name="generate", validate_parameters=False)
def generate(params: str = "params.yaml", overrides: list[str] | None = None) -> str:
    """Generates all validation clips with the last trained stage; returns the folder of items.

    Raises:
        MagicDriveError: no weights, or a shard failed twice; what was finished is kept.
    """
    config = load_config(params, overrides)
    places = find_places(config)
    items = list_items(config, read_scenes(Path("artifacts/infos")))
    digests = input_digests(config, places.model.folder)
    missing = [
        item for item in items if not is_done(places.generated / item.name, item_fingerprint(config, item, digests))
    ]
    shards = min(config.generate.workers, len(missing))
    settings = setting_words(params, overrides)
    with no_orphans(), _counted(places.generated, len(items)):
        futures = [
            generate_shard.submit(f"{number}/{shards}", settings, places.generated / f"shard-{number}.log")
            for number in range(1, shards + 1)
        ]
        for future in futures:
            future.wait()  # all of them, before the first failure is raised: the others' work is kept
        for future in futures:
            future.result()
    get_run_logger().info("%d items, %d of them new: %s", len(items), len(missing), places.generated)
    return str(places.generated)


@contextmanager
def _counted(folder: Path, items: int) -> Iterator[None]:
    """One bar over all shards: the items that are there, counted once a second."""
    ended = threading.Event()
    with progress_bar() as bar:
        row = bar.add_task("generate", total=items)

        def count() -> None:
            going = True
            while going:
                going = not ended.wait(1.0)
                bar.update(row, completed=sum(1 for _ in folder.glob(f"*/{RECORD}")))

        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        try:
            yield
        finally:
            ended.set()
            counter.join()


if __name__ == "__main__":
    main(flow_command(generate))
