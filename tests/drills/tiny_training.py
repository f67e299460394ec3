"""A tiny training under the real launcher, agent and ranks: ``python -m tests.drills.tiny_training FOLDER``.

The launcher starts this module again as its ranks. ``DRILL_CLOCK`` moves the clock of all of them, in seconds.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

PACE = 0.02  # seconds of a step, so that faults find it at work


def move_clock() -> None:
    """Move this process's clock; the monotonic one goes on as it does on a real host."""
    offset, now = float(os.environ.get("DRILL_CLOCK", "0")), time.time
    time.time = lambda: now() + offset


def launch(folder: Path) -> int:
    """Start the ranks, again where they saved a checkpoint and want to resume; returns an exit status."""
    from magicdrive_core.errors import MagicDriveError, report_error
    from magicdrive_core.launch.process_group import RESUMABLE, run_group

    command = ["-m", "tests.drills.tiny_training", "rank", str(folder)]
    files = {"log": folder / "log.txt", "status": folder / "status.json"}
    code = RESUMABLE
    try:
        while code == RESUMABLE:
            code = run_group(command, 2, **files, stall_seconds=600, threads=1, grace_seconds=20)
    except MagicDriveError as error:
        report_error(error, "")
        return 1
    return code


def rank(folder: Path) -> int:
    """Train as one rank."""
    import torch.distributed as dist

    from magicdrive_core.training.engine import join_group
    from magicdrive_core.training.worker import StopRequest
    from tests.training.tiny_rank import MadeUpLoader, train_tiny

    stop = StopRequest()
    join_group(stall_seconds=600)
    following = MadeUpLoader.next

    def unhurried(loader: MadeUpLoader) -> object:
        time.sleep(PACE)
        return following(loader)

    MadeUpLoader.next = unhurried  # type: ignore[method-assign,assignment]
    code = train_tiny(folder, stop)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    move_clock()
    sys.exit(rank(Path(sys.argv[2])) if sys.argv[1] == "rank" else launch(Path(sys.argv[1])))
