"""Flow ``prepare``: the data and everything that is computed from it before training.

    python -m flows.prepare

``magicdrive synth`` where the profile asks for generated data, then ``dvc repro``: DVC knows what is stale and runs
just that. Both read params.yaml, because DVC does.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.common import main, run_child, run_verb, tool
from magicdrive_core.config import load_config

DATA_VERSION = Path("data.dvc")


@task(cache_policy=NO_CACHE, task_run_name="dvc repro")
def reproduce() -> None:
    """Runs the stages of dvc.yaml that are stale; says so when the data is no longer what data.dvc names."""
    before = _read(DATA_VERSION)
    run_child([tool("dvc"), "repro"])
    if _read(DATA_VERSION) != before:
        get_run_logger().warning("data/ differs from the version that %s named; it names the new one now", DATA_VERSION)


@flow(name="prepare", validate_parameters=False)
def prepare() -> None:
    """Data, infos, conditions, encoders, text features and latents, as params.yaml says."""
    config = load_config()
    if config.synth is not None:
        run_verb("synth")
    reproduce()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


if __name__ == "__main__":
    main(prepare)
