"""How many devices this host has, found without torch: launchers and flows run where there is none."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

from magicdrive_core.config.schema import Cluster
from magicdrive_core.errors import UsageError

# Device files, and the variable that hides some of them.
KINDS = ((r"nvidia\d+", "CUDA_VISIBLE_DEVICES"), (r"davinci\d+", "ASCEND_RT_VISIBLE_DEVICES"))


def check_ranks(cluster: Cluster, devices: Path = Path("/dev")) -> None:
    """Refuses more local ranks than this host has devices; on CPUs, ranks share the cores.

    Raises:
        UsageError: there are devices, but too few.
    """
    count = _count(devices)
    if cluster.launcher == "local" and 0 < count < cluster.ranks and "+cpu" not in version("torch"):
        raise UsageError(
            f"cluster.ranks {cluster.ranks} is more than the {count} devices of this host",
            f"-S cluster.ranks={count}, or hide the devices to run on CPUs: {KINDS[0][1]}=",
        )


def _count(devices: Path) -> int:
    names = [path.name for path in devices.iterdir()]
    counts = []
    for pattern, variable in KINDS:
        present = sum(re.fullmatch(pattern, name) is not None for name in names)
        if variable in os.environ:
            visible = [word for word in os.environ[variable].split(",") if word.strip() and word.strip() != "-1"]
            present = min(present, len(visible))
        counts.append(present)
    return max(counts)
