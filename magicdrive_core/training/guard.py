"""What becomes of a step whose loss or gradient is not finite on any rank.

It is skipped: no weight, moment or average changes, and the data goes on. Several such steps in a row are no accident:
the training ends with a report. No checkpoint is begun between the first of them and the next good step, so that the
newest one is always good, and starting again goes on from there.

In fp16 a gradient that overflows is no accident as long as the loss scale can be lowered: it is, the step is skipped
too, and nothing is counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.training.checkpoints import checkpoints
from magicdrive_core.training.engine import LossScale
from magicdrive_core.training.statistics import RankStatistics, find_faults
from magicdrive_core.utils.files import write_json

logger = logging.getLogger(__name__)


class Guard:
    """Counts the steps in a row that were skipped; ``most`` of them are too many."""

    def __init__(self, plan: StagePlan, most: int, scale: LossScale | None) -> None:
        self._plan, self._most, self._scale = plan, most, scale
        self._row: list[dict[str, Any]] = []

    def faults(self, step: int, ranks: Sequence[RankStatistics], learning_rate: float) -> list[str]:
        """What is not finite at this step, a line a rank, the same on all ranks; none: the step is good."""
        found = find_faults(ranks)
        if found and self._scale and not self._scale.at_minimum and all(math.isfinite(facts.loss) for facts in ranks):
            found = [f"the loss scale {self._scale.scale:g} is too large: {fault}" for fault in found]
            self._scale.back_off()
            if dist.get_rank() == 0:
                logger.info("step %d is skipped: %s", step, "; ".join(found))
        elif found:
            if dist.get_rank() == 0:
                logger.warning("step %d is skipped: %s", step, "; ".join(found))
            losses = [str(facts.loss) for facts in ranks]
            self._row.append({"step": step, "faults": found, "losses": losses, "learning_rate": learning_rate})
        else:
            self._row.clear()
        return found

    @property
    def clean(self) -> bool:
        """Whether the last step was good: only then a checkpoint may be begun."""
        return not self._row

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return len(self._row) >= self._most

    def give_up(self) -> MagicDriveError:
        """Writes the report; returns the error that ends the training. On all ranks, when no checkpoint is pending."""
        first, last = self._row[0], self._row[-1]
        report = self._plan.folder / "nonfinite.json"
        newest: list[str | None] = [None]
        if dist.get_rank() == 0:
            saved = checkpoints(self._plan.folder / "checkpoints")
            newest = [saved[-1].name if saved else None]
            write_json(report, {"stage": self._plan.stage, "skipped": self._row, "goes_on_from": newest[0]})
        # Other hosts may not see the newest folder yet, and a rank that ends earlier would have the writer ended too.
        dist.broadcast_object_list(newest, src=0)
        good = newest[0] or "the start"
        where = f"step {first['step']}: {first['faults'][0]}"
        return MagicDriveError(
            f"no finite step from {first['step']} to {last['step']}, rolled back to {good} ({where}); report: {report}",
            "run again to go on from there; if that ends alike, the settings are to blame: try a lower learning rate",
        )
