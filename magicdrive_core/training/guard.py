"""Steps whose loss or gradient is not finite on any rank.

Such a step is skipped: no weight, moment or average changes, and training continues with the next micro-batches.
Several in a row end the training with a report. No checkpoint starts between the first of them and the next good step,
so that the newest checkpoint is always good, and resuming starts there.

In fp16 a gradient that overflows is no fault as long as the loss scale can be lowered: the scale is halved, the step is
skipped, and nothing is counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.parallel import control
from magicdrive_core.training.checkpoints import checkpoints, step_of
from magicdrive_core.training.engine import LossScale
from magicdrive_core.training.statistics import RankStatistics
from magicdrive_core.utils.files import write_json

logger = logging.getLogger(__name__)


class Guard:
    """Finds steps to skip, and counts how many were skipped in a row.

    Args:
        plan: the stage, whose folder gets the report.
        max_skipped: skipped steps in a row that end the training.
        scale: fp16's loss scale; None in other precisions.
    """

    def __init__(self, plan: StagePlan, max_skipped: int, scale: LossScale | None) -> None:
        self._plan, self._max_skipped, self._scale = plan, max_skipped, scale
        self._skipped: list[dict[str, Any]] = []  # in a row, up to the last step

    def check(self, step: int, ranks: Sequence[RankStatistics], learning_rate: float) -> list[str]:
        """Find out whether a step must be skipped; count it, and lower the loss scale where that is the remedy.

        Args:
            step: number of the step, counted from 0.
            ranks: statistics of all ranks, by rank.
            learning_rate: the step's rate, for the report.

        Returns:
            Why the step must be skipped, one line for each faulty rank and the same on all ranks; empty for a good
            step.
        """
        faults = find_faults(ranks)
        losses_finite = all(math.isfinite(each.loss) for each in ranks)
        if faults and self._scale and not self._scale.at_minimum and losses_finite:
            faults = [f"the loss scale {self._scale.scale:g} is too large: {fault}" for fault in faults]
            self._scale.back_off()
            if dist.get_rank() == 0:
                logger.info("step %d is skipped: %s", step, "; ".join(faults))
        elif faults:
            if dist.get_rank() == 0:
                logger.warning("step %d is skipped: %s", step, "; ".join(faults))
            losses = [str(each.loss) for each in ranks]
            self._skipped.append({"step": step, "faults": faults, "losses": losses, "learning_rate": learning_rate})
        else:
            self._skipped.clear()
        return faults

    @property
    def clean(self) -> bool:
        """Whether the last step was good; only then a checkpoint may start."""
        return not self._skipped

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return len(self._skipped) >= self._max_skipped

    def give_up(self) -> MagicDriveError:
        """Write ``nonfinite.json`` and make the error that ends the training. Collective; no checkpoint may be pending.

        Returns:
            The error to raise: the first fault, the report, and the checkpoint from which the same command resumes.
        """
        first, last = self._skipped[0], self._skipped[-1]
        report = self._plan.folder / "nonfinite.json"
        newest = None
        if dist.get_rank() == 0:
            folder = self._plan.folder / "checkpoints"
            saved = [path for path in checkpoints(folder) if step_of(path) <= last["step"]]
            newest = saved[-1].name if saved else None
            write_json(report, {"stage": self._plan.stage, "skipped": self._skipped, "resumes_from": newest})
        # Other hosts may not see the newest folder yet, and a rank that exits early would end the rank that writes.
        newest = control.from_leader(newest)
        return MagicDriveError(
            f"no finite loss and gradient from step {first['step']} to {last['step']}"
            f" (step {first['step']}: {first['faults'][0]}); report: {report}",
            f"run the same command to resume from {newest or 'the start'}; if it fails again, lower the learning rate",
        )


def find_faults(ranks: Sequence[RankStatistics]) -> list[str]:
    """List non-finite losses and gradients by originating rank; ranks that only received them are left out.

    Args:
        ranks: statistics of all ranks, by rank.

    Returns:
        One line for each rank where a fault arose. Where none arose but sums were received that are not finite
        (ColossalAI #6091), one line for each rank that received one. Empty where all is finite.
    """
    faults = []
    for rank, statistics in enumerate(ranks):
        faulty = statistics.gradients.faulty
        if not math.isfinite(statistics.loss):
            faults.append(f"the loss of rank {rank} is {statistics.loss}")
        elif faulty:
            more = f" and {len(faulty) - 1} more parameters" if len(faulty) > 1 else ""
            faults.append(f"the gradient of {faulty[0]}{more} on rank {rank} is not finite")
    if faults:
        return faults
    received = [rank for rank, statistics in enumerate(ranks) if not statistics.gradients.received_finite]
    return [f"rank {rank} received a non-finite sum of finite gradients (see ColossalAI #6091)" for rank in received]
