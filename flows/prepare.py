"""Flow ``prepare``: the data and everything that is computed from it before training.

Run it with ``python -m flows.prepare``. It calls ``magicdrive synth`` if params.yaml asks for generated data, then
``dvc repro``, which runs the stages that are stale. It takes no overrides, because DVC reads params.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.common import main, run_child, run_verb, tool
from magicdrive_core.config.load import load_config
from magicdrive_core.data.infos import pictures_changed
from magicdrive_core.data.nuscenes_files import check_root

DATA_VERSION, INFOS = Path("data.dvc"), Path("artifacts/infos")
LOCK = Path(".dvc/tmp/prepare.lock")


@task(cache_policy=NO_CACHE, task_run_name="dvc repro")
def reproduce() -> None:
    """Runs the stale stages of dvc.yaml; warns if the data is no longer the version that data.dvc names.

    Raises:
        MagicDriveError: the data set is missing or incomplete, or a stage failed.
    """
    before = _read(DATA_VERSION)
    data = load_config().data
    check_root(data.root, data.version)  # DVC would name the missing folder, but not what to do
    if pictures_changed(INFOS, Path(data.root)):
        get_run_logger().warning(
            "the pictures below %s have changed: everything that depends on them is made again", data.root
        )
        run_child([tool("dvc"), "repro", "--force", "--single-item", "infos"])
    run_child([tool("dvc"), "repro"])
    if _read(DATA_VERSION) != before:
        get_run_logger().warning("data/ has changed; %s now names the new version", DATA_VERSION)


@flow(name="prepare", validate_parameters=False)
def prepare() -> None:
    """Makes data, infos, conditions, encoders, text features and latents, as params.yaml says.

    Raises:
        MagicDriveError: the data set is missing or incomplete, or a step failed; finished stages are kept.
    """
    config = load_config()
    with alone():
        if config.synth is not None:
            run_verb("synth")
        reproduce()


@contextmanager
def alone() -> Iterator[None]:
    """Waits until no other flow prepares data in this project; the system frees the lock of a process that died.

    DVC's own lock makes a second ``dvc repro`` fail as soon as both want one stage; it cannot wait for a stage.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        get_run_logger().info("another flow prepares the data of this project: waiting for it")
        lock.acquire(poll_interval=1.0)
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


if __name__ == "__main__":
    main(prepare)
