"""The schema of params.yaml, section cluster: each setting with its meaning, its bounds and its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from magicdrive_core.config.base import Count, Positive, Section


class Slurm(Section):
    """A job of ``cluster.hosts`` whole nodes (``cluster.launcher: slurm``)."""

    partition: str | None = None  # null: the cluster's default
    account: str | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] = "1-00:00:00"  # limit of a start: days-h:m:s
    devices: str | None = "gpu"  # generic resource, cluster.ranks of it a node ("npu": Ascend); null: none is asked for
    setup: list[str] = []  # shell lines before the ranks, such as: module load cuda
    options: list[str] = []  # further ones of sbatch, such as: --qos=high


class Kubernetes(Section):
    """A JobSet of ``cluster.hosts`` pods (``cluster.launcher: kubernetes``)."""

    image: str  # holds the environment: python with this project's requirements
    volume_claim: str  # of the shared volume that holds the project's folder
    project: str = "."  # the project's folder, as seen from the volume's root
    python: str = "python"  # in the image
    namespace: str = "default"
    devices: str | None = "nvidia.com/gpu"  # resource, cluster.ranks of it a pod ("huawei.com/Ascend910"); null: none
    shared_memory: str = "64Gi"  # /dev/shm of a pod: ranks of a host talk through it
    node_selector: dict[str, str] = {}


class Cluster(Section):
    """Where a process group runs: the same command line everywhere (docs/how-to/several-hosts.md)."""

    launcher: Literal["local", "slurm", "kubernetes"] = "local"
    hosts: Positive = 1  # more than one needs slurm or kubernetes
    ranks: Positive  # processes on each host, one a device
    sequence_parallel: Positive = 1  # neighbouring ranks that share a clip; divides all ranks and model.heads
    threads: Count = 0  # CPU threads of a rank; 0: the host's cores shared evenly
    stall_seconds: Positive = 1800  # without a finished step: the group is stopped
    # between asking the ranks to save and killing them: the longest step and a checkpoint have to fit
    grace_seconds: Positive = 25
    environment: dict[str, str] = {}  # variables of the ranks
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None

    @property
    def world(self) -> int:
        """Ranks on all hosts."""
        return self.hosts * self.ranks

    @model_validator(mode="after")
    def _launchable(self) -> Cluster:
        if self.launcher == "local" and self.hosts > 1:
            raise ValueError(f"hosts {self.hosts} needs launcher slurm or kubernetes: local starts ranks on this host")
        if self.launcher == "slurm" and self.slurm is None:
            raise ValueError("launcher slurm needs a slurm section; {} takes the cluster's defaults")
        if self.launcher == "kubernetes" and self.kubernetes is None:
            raise ValueError("launcher kubernetes needs a kubernetes section with image and volume_claim")
        return self
