"""One of the processes that generate clips together: ``torchrun ... -m magicdrive_core.inference.worker JOB``.

Rank 0 chooses the items, samples with the others, decodes and writes; the others sample what it names. A rank that
fails ends all of them (launch.py): what is finished is kept.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import Config
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.device import backend, take_device
from magicdrive_core.inference.generate import follow_leader, generate_items
from magicdrive_core.inference.items import list_items
from magicdrive_core.inference.processes import ProcessGroup
from magicdrive_core.launch.process_group import run_group
from magicdrive_core.utils.files import read_json, write_json


def generate_in_group(config: Config, model: Path, out: Path, shard: tuple[int, int]) -> None:
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


@record  # so that the launcher can name the rank that failed first, with its exception
def main() -> None:
    """Generates, or helps to."""
    job = read_json(Path(sys.argv[1]))
    config, (share, shares) = parse_config(job["config"], source=sys.argv[1]), job["shard"]
    # The workers of one host take turns at its devices.
    take_device(share * config.generate.devices + int(os.environ["LOCAL_RANK"]), share=True)
    patience = timedelta(seconds=config.cluster.stall_seconds)  # of the others, while rank 0 decodes and writes
    dist.init_process_group(backend(), timeout=patience)
    team = ProcessGroup(Path(job["status"]), split_guidance=config.generate.devices > config.generate.sequence_parallel)
    try:
        if dist.get_rank() == 0:
            items = list_items(config, read_scenes(Path("artifacts/infos")))
            with team.leading():
                generate_items(config, items, Path(job["model"]), Path(job["out"]), shard=(share, shares), team=team)
        else:
            follow_leader(config, Path(job["model"]), team)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
