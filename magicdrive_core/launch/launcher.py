"""The launcher that params.yaml names: runs a job with it, or shows what it would submit."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from magicdrive_core.config.schema import Cluster
from magicdrive_core.errors import UsageError
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.kubernetes import KubernetesQueue
from magicdrive_core.launch.process_group import agent_command, run_group
from magicdrive_core.launch.queue import Queue, run_queued
from magicdrive_core.launch.slurm import SlurmQueue

# Names of device files, and the variable that hides some of the devices. Found without torch, which is not installed
# where flows run.
DEVICE_FILES = ((r"nvidia\d+", "CUDA_VISIBLE_DEVICES"), (r"davinci\d+", "ASCEND_RT_VISIBLE_DEVICES"))


def run_job(cluster: Cluster, job: Job, on_poll: Callable[[], None] | None = None) -> int:
    """Run a job to its end on this host or in a queue.

    Args:
        cluster: names the launcher.
        job: what to run.
        on_poll: called twice a second, e.g. to move a progress bar; None: nothing.

    Returns:
        0, or 75 (``RESUMABLE``) when the ranks saved a checkpoint and want to be started again.

    Raises:
        MagicDriveError: the scheduler refused the job, or the job failed.
        BaseException: whatever interrupted the waiting, raised again after the job has ended.
    """
    queue = _queue(cluster)
    if queue is not None:
        return run_queued(queue, job, on_poll)
    return run_group(
        job.command,
        job.ranks,
        log=job.log,
        status=job.status,
        stall_seconds=job.stall_seconds,
        threads=job.threads,
        environment=job.environment,
        on_poll=on_poll,
        grace_seconds=job.grace_seconds,
    )


def show_job(cluster: Cluster, job: Job) -> str:
    """Return what would be started. Nothing is written.

    Args:
        cluster: names the launcher.
        job: what would run.

    Returns:
        A batch script, a manifest, or the agent's command line with the ranks' variables; it ends with a line end.
    """
    queue = _queue(cluster)
    if queue is not None:
        return queue.render(job)
    variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    return " ".join([*variables, "python", *map(shlex.quote, agent_command(job.command, job.ranks))]) + "\n"


def _queue(cluster: Cluster) -> Queue | None:
    if cluster.launcher == "slurm" and cluster.slurm is not None:
        return SlurmQueue(cluster.slurm)
    if cluster.launcher == "kubernetes" and cluster.kubernetes is not None:
        return KubernetesQueue(cluster.kubernetes)
    return None


def check_ranks(cluster: Cluster, devices: Path = Path("/dev")) -> None:
    """Refuse more local ranks than this host has devices; on CPUs, ranks share the cores.

    Args:
        cluster: the launcher and its ranks.
        devices: folder of the device files.

    Raises:
        UsageError: there are devices, but too few.
    """
    count = _count_devices(devices)
    if cluster.launcher == "local" and 0 < count < cluster.ranks and "+cpu" not in version("torch"):
        raise UsageError(
            f"cluster.ranks {cluster.ranks} is more than the {count} devices of this host",
            f"-S cluster.ranks={count}, or hide the devices to run on CPUs: {DEVICE_FILES[0][1]}=",
        )


def _count_devices(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()]
    counts = []
    for pattern, variable in DEVICE_FILES:
        present = sum(re.fullmatch(pattern, name) is not None for name in names)
        if variable in os.environ:
            visible = [word for word in os.environ[variable].split(",") if word.strip() and word.strip() != "-1"]
            present = min(present, len(visible))
        counts.append(present)
    return max(counts)
