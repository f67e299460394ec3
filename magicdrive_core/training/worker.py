"""One rank of a stage's training.

The launcher starts it on every rank with the folder of a job that ``magicdrive train`` has written. By hand, on a CPU:
``torchrun --standalone --nproc-per-node 1 -m magicdrive_core.training.worker runs/stage1-0123456789ab``
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import read_job
from magicdrive_core.inference.claims import EXPIRY, Claims
from magicdrive_core.launch.process_group import LAUNCHER_PIPE
from magicdrive_core.training.engine import join_group
from magicdrive_core.training.loader import Loader
from magicdrive_core.training.loop import train
from magicdrive_core.training.preview import Preview
from magicdrive_core.training.stage import first_network


class StopRequest:
    """Notes that this process is requested to stop: by a signal, or because its launcher is gone."""

    def __init__(self) -> None:
        self._signalled = False
        self._pipe = os.environ.get(LAUNCHER_PIPE) == "1"
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        self._signalled = True  # the loop ends the step first; all ranks then agree to stop

    @property
    def requested(self) -> bool:
        """True from the first request on."""
        if not self._signalled and self._pipe and select.select([sys.stdin], [], [], 0)[0]:
            self._signalled = True  # nothing is ever written into the pipe: readable means closed
        return self._signalled


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the claim on a run's folder, so that no other process trains into it on any host.

    Not a lock of the operating system: shared file systems may refuse it (Lustre does unless mounted with flock).

    Args:
        folder: of the run.

    Raises:
        MagicDriveError: another process trains into the folder.
    """
    with Claims(folder) as claims:
        if claims.take("training") is None:
            raise MagicDriveError(
                f"{folder} is being trained by another process",
                f"wait for it, or stop it; a training that ended on another host frees it after {EXPIRY:.0f} s",
            )
        yield


@record  # so that the launcher can name the rank that failed first, with its exception
def main() -> None:
    """Train, and exit with 0 (finished) or 75 (checkpoint saved, may be started again)."""
    stop = StopRequest()
    folder = Path(sys.argv[1])
    config, plan = read_job(folder)
    device = join_group(config.cluster.stall_seconds)
    rank = dist.get_rank()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format=f"[rank {rank}] %(message)s")
    with claimed(folder) if rank == 0 else nullcontext():
        network = first_network(config, plan)
        preview = Preview.of(config, plan.stage) if rank < config.cluster.sequence_parallel_of(plan.stage) else None
        code = train(config, plan, network, Loader(config, plan.stage), preview, stop, device)
    dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that are in another collective
    sys.exit(code)


if __name__ == "__main__":
    main()
