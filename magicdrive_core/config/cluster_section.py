"""Settings of where a process group runs: this host, Slurm or Kubernetes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from magicdrive_core.config.base import Count, Positive, PositiveFloat, Section, about
from magicdrive_core.config.training_sections import Stage

# Settings whose values may hold secrets: they are neither recorded in MLflow nor shown in messages.
SECRETS = ("cluster.environment.", "cluster.slurm.setup")


class Slurm(Section):
    """A Slurm job of ``cluster.hosts`` whole nodes."""

    partition: Annotated[str | None, about("Partition. null: the cluster's default.", used_in="launch/slurm.sh.j2")] = (
        None
    )
    account: Annotated[
        str | None, about("Account that pays. null: the user's default.", used_in="launch/slurm.sh.j2")
    ] = None
    time: Annotated[
        str,
        Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$"),
        about("Time limit of one start of the job.", unit="days-hours:minutes:seconds", used_in="launch/slurm.sh.j2"),
    ] = "1-00:00:00"
    devices: Annotated[
        str | None,
        about(
            "Generic resource of which each node needs cluster.ranks, such as gpu, or npu for Ascend. null: none.",
            used_in="launch/slurm.sh.j2",
        ),
    ] = "gpu"
    setup: Annotated[
        list[str],
        about("Shell lines that run before the ranks, such as: module load cuda", used_in="launch/slurm.sh.j2"),
    ] = []
    options: Annotated[
        list[str], about("Further options of sbatch, such as: --qos=high", used_in="launch/slurm.sh.j2")
    ] = []


class Kubernetes(Section):
    """A JobSet of ``cluster.hosts`` pods."""

    image: Annotated[
        str,
        about("Container image with Python and this project's requirements.", used_in="launch/kubernetes.py"),
    ]
    volume_claim: Annotated[
        str, about("Claim of the shared volume that holds the project's folder.", used_in="launch/kubernetes.py")
    ]
    project: Annotated[
        str, about("The project's folder, relative to the volume's root.", used_in="launch/kubernetes.py")
    ] = "."
    python: Annotated[str, about("Python's command in the image.", used_in="launch/kubernetes.py")] = "python"
    namespace: Annotated[str, about("Namespace of the JobSet.", used_in="launch/kubernetes.py")] = "default"
    devices: Annotated[
        str | None,
        about(
            "Resource of which each pod needs cluster.ranks, such as huawei.com/Ascend910. null: none.",
            used_in="launch/kubernetes.py",
        ),
    ] = "nvidia.com/gpu"
    shared_memory: Annotated[
        str,
        about(
            "Size of /dev/shm in a pod, through which the ranks of a host communicate.",
            unit="Kubernetes quantity",
            used_in="launch/kubernetes.py",
        ),
    ] = "64Gi"
    node_selector: Annotated[
        dict[str, str], about("Labels that a pod's node must have.", used_in="launch/kubernetes.py")
    ] = {}


class Cluster(Section):
    """Where a process group runs; the command line is the same everywhere."""

    launcher: Annotated[
        Literal["local", "slurm", "kubernetes"],
        about("What starts the ranks.", used_in="launch/launcher.py"),
    ] = "local"
    hosts: Annotated[
        Positive,
        about("Number of hosts. More than one needs slurm or kubernetes.", unit="hosts", used_in="launch/job.py"),
    ] = 1
    ranks: Annotated[
        Positive, about("Processes on each host, one per device.", unit="processes", used_in="launch/job.py")
    ]
    sequence_parallel: Annotated[
        Positive | dict[Stage, Positive],
        about(
            "Neighbouring ranks that share the tokens of each clip. Divides all ranks and model.heads. One number for"
            " all stages, or one for each: {stage3: 4}; a stage without an entry has 1.",
            unit="ranks",
            used_in="parallel/mesh.py",
        ),
    ] = 1
    device_gbytes: Annotated[
        PositiveFloat | None,
        about(
            "Memory of each device. A stage that does not fit is refused before it starts. null: not checked.",
            unit="GB (10^9 bytes)",
            used_in="training/supervise.py",
        ),
    ] = None
    threads: Annotated[
        Count,
        about("CPU threads of a rank. 0: the host's cores, shared evenly.", unit="threads", used_in="launch/job.py"),
    ] = 0
    stall_seconds: Annotated[
        Positive,
        about(
            "The group is stopped after this time without a finished step.",
            unit="seconds",
            used_in="launch/process_group.py",
        ),
    ] = 1800
    grace_seconds: Annotated[
        Positive,
        about(
            "Time between asking the ranks to save a checkpoint and killing them. The longest step and a checkpoint"
            " must fit into it.",
            unit="seconds",
            used_in="launch/job.py",
        ),
    ] = 25
    environment: Annotated[dict[str, str], about("Environment variables of the ranks.", used_in="launch/job.py")] = {}
    slurm: Annotated[
        Slurm | None,
        about("Settings of launcher slurm; {} takes the cluster's defaults.", used_in="launch/slurm.py"),
    ] = None
    kubernetes: Annotated[
        Kubernetes | None, about("Settings of launcher kubernetes.", used_in="launch/launcher.py")
    ] = None

    @property
    def world(self) -> int:
        """Number of ranks on all hosts together."""
        return self.hosts * self.ranks

    def sequence_parallel_of(self, stage: Stage) -> int:
        """Number of neighbouring ranks that share the tokens of each clip in a stage.

        Args:
            stage: the stage.
        """
        share = self.sequence_parallel
        return share.get(stage, 1) if isinstance(share, dict) else share

    @model_validator(mode="after")
    def _launchable(self) -> Cluster:
        if self.launcher == "local" and self.hosts > 1:
            raise ValueError(f"hosts {self.hosts} needs launcher slurm or kubernetes: local starts ranks on this host")
        if self.launcher == "slurm" and self.slurm is None:
            raise ValueError("launcher slurm needs a slurm section; {} takes the cluster's defaults")
        if self.launcher == "kubernetes" and self.kubernetes is None:
            raise ValueError("launcher kubernetes needs a kubernetes section with image and volume_claim")
        return self
