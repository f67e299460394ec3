"""A worker of generation: one process, or a supervised process group of several devices on this host.

In a group, rank 0 leads: it takes the items, samples with the other ranks, decodes and writes. The others follow: they
sample the items that it announces. A rank that fails ends the whole group; finished items stay.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import Config
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.launch.process_group import run_group
from magicdrive_core.utils.files import read_json, write_json


def run_worker(config: Config, shard: tuple[int, int]) -> str:
    """Generates one worker's share of the validation clips of the project in the working directory.

    Args:
        config: settings.
        shard: (number of this worker, number of workers).

    Returns:
        What was done, in one line.

    Raises:
        MagicDriveError: no finished training, missing inputs, or items that failed twice; finished items stay.
    """
    paths = find_run_paths(config)
    stage_folder = paths.trained_model().folder
    if config.generate.devices > 1:
        generate_in_group(config, stage_folder, paths.generated, shard)
        return f"finished: {paths.generated}"
    # Imported here: the process that starts a group needs no torch.
    from magicdrive_core.data.infos import read_scenes
    from magicdrive_core.device import take_device
    from magicdrive_core.inference.generate import generate_items
    from magicdrive_core.inference.items import list_items

    take_device(shard[0], share=True)  # the workers of one host take turns at its devices
    items = list_items(config, read_scenes(Path("artifacts/infos")))
    summary = generate_items(config, items, stage_folder, paths.generated, shard=shard)
    return f"{len(summary.made)} made, {len(summary.skipped)} finished before: {paths.generated}"


def generate_in_group(config: Config, stage_folder: Path, out: Path, shard: tuple[int, int]) -> None:
    """Generates the items of a worker on ``generate.devices`` processes of this host.

    Args:
        config: settings.
        stage_folder: a finished training run.
        out: folder of the items' folders; the group's job, log and sign of life are written there too.
        shard: (number of this worker, number of workers).

    Raises:
        MagicDriveError: a process failed, or an item did; finished items stay.
    """
    name = f"shard-{shard[0] + 1}"
    job, status = out / f"{name}.json", out / f"{name}.alive"
    write_json(
        job,
        {
            "config": config.model_dump(mode="json", exclude={"cluster": {"environment"}}),
            "model": str(stage_folder),
            "out": str(out),
            "shard": shard,
            "status": str(status),
        },
        private=True,  # tracking.uri may hold a password
    )
    run_group(
        ["-m", "magicdrive_core.inference.worker", str(job)],
        config.generate.devices,
        log=out / f"{name}.ranks.log",
        status=status,
        stall_seconds=config.cluster.stall_seconds,
        threads=config.cluster.threads,
        environment={"PYTHONWARNINGS": "ignore:Please install"},
    )


def main(job_file: Path) -> None:
    """Leads or follows, as one process of the group.

    Args:
        job_file: the job that ``generate_in_group`` wrote.
    """
    # Imported here: the process that starts the group needs no torch.
    import torch.distributed as dist

    from magicdrive_core.data.infos import read_scenes
    from magicdrive_core.device import backend, take_device
    from magicdrive_core.inference.generate import follow_leader, generate_items
    from magicdrive_core.inference.items import list_items
    from magicdrive_core.inference.processes import ProcessGroup

    job = read_json(job_file)
    config, (share, shares) = parse_config(job["config"], source=str(job_file)), job["shard"]
    # The workers of one host take turns at its devices.
    take_device(share * config.generate.devices + int(os.environ["LOCAL_RANK"]), share=True)
    # The followers wait as long as the launcher does while rank 0 decodes and writes.
    dist.init_process_group(backend(), timeout=timedelta(seconds=config.cluster.stall_seconds))
    split_guidance = config.generate.devices > config.generate.sequence_parallel
    processes = ProcessGroup(Path(job["status"]), split_guidance=split_guidance)
    if dist.get_rank() == 0:
        items = list_items(config, read_scenes(Path("artifacts/infos")))
        stage_folder, out = Path(job["model"]), Path(job["out"])
        with processes.leading():
            generate_items(config, items, stage_folder, out, shard=(share, shares), processes=processes)
    else:
        follow_leader(config, Path(job["model"]), processes)
    dist.destroy_process_group()  # not after an error: it can wait for ever for ranks that are gone


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)(Path(sys.argv[1]))  # the launcher then knows which rank failed first, and its exception
