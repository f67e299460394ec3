"""A real Slurm of two hosts on this machine, in a temporary folder: munged, slurmctld and two slurmd."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=host[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Path]:
    """Start the cluster, yield its slurm.conf, and stop it; skip the test without Slurm or without root."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]} here: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        pytest.skip("slurmd starts jobs as root only")
    (folder / "munge").mkdir(parents=True, mode=0o700)
    (folder / "state").mkdir()
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname().partition(".")[0], ports=_ports()))
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    files = {name: folder / "munge" / name for name in ("socket", "pid-file", "log-file", "seed-file")}
    munge = [f"--{name}={path}" for name, path in files.items()]
    with ExitStack() as stack:
        commands = [
            ["munged", "--foreground", "--force", *munge, f"--key-file={key}"],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "host0"],
            ["slurmd", "-D", "-N", "host1"],
        ]
        for number, command in enumerate(commands):
            output = stack.enter_context((folder / f"daemon-{number}.out").open("wb"))
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            stack.callback(_end, process)
        end = time.monotonic() + 60
        while _sinfo(environment) != "idle 2":
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield conf


def _ports() -> list[int]:
    """Find three free ports in a row: Slurm takes the ports of its hosts as a range."""
    for first in range(27100, 27900, 3):
        with ExitStack() as stack:
            try:
                for port in range(first, first + 3):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return [first, first + 1, first + 2]
    raise AssertionError("no three ports in a row are free")


def _sinfo(environment: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--format=%T %D"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
