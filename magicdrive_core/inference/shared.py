"""Generation by devices that share the work on each clip: one supervised process group (rank.py)."""

from __future__ import annotations

from pathlib import Path

from magicdrive_core.config.schema import Config
from magicdrive_core.launch.process_group import run_group
from magicdrive_core.utils.files import write_json


def generate_shared(config: Config, model: Path, out: Path, shard: tuple[int, int]) -> None:
    """Runs ``rank.py`` on ``generate.devices`` processes of this host; arguments as of ``generate_items``.

    Raises:
        MagicDriveError: a process failed, or an item did; what is finished is kept.
    """
    name = f"shard-{shard[0] + 1}"
    job, status = out / f"{name}.json", out / f"{name}.alive"
    write_json(
        job,
        {
            "config": config.model_dump(mode="json"),
            "model": str(model),
            "out": str(out),
            "shard": shard,
            "status": str(status),
        },
    )
    run_group(
        ["-m", "magicdrive_core.inference.worker", str(job)],
        config.generate.devices,
        log=out / f"{name}.ranks.log",
        status=status,
        stall_seconds=config.cluster.stall_seconds,
        threads=config.cluster.threads,
        environment={"PYTHONWARNINGS": "ignore"},
    )
