"""The launcher that params.yaml names: runs a job with it, or shows what it would submit."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from magicdrive_core.config.schema import Cluster
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.kubernetes import KubernetesQueue
from magicdrive_core.launch.process_group import agent_command, run_group
from magicdrive_core.launch.queue import Queue, run_queued
from magicdrive_core.launch.slurm import SlurmQueue


def run_job(cluster: Cluster, job: Job, on_poll: Callable[[], None] | None = None) -> int:
    """Runs a job to its end; arguments, result and errors as of ``run_queued``."""
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
    """Return what would be started: a batch script, a manifest, or the agent's command line. Nothing is written."""
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
