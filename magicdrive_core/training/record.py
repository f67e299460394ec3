"""What rank 0 writes down of a run: metrics.jsonl (every step), status.json (heartbeat), MLflow."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist

from magicdrive_core.config import Bucket, Config
from magicdrive_core.files import atomic_file, write_json
from magicdrive_core.model.network import MagicDrive
from magicdrive_core.training.checkpoint import Progress
from magicdrive_core.training.facts import RankFacts
from magicdrive_core.training.plan import StagePlan
from magicdrive_core.training.preview import Preview

if TYPE_CHECKING:
    from magicdrive_core.tracking.runs import MetricLog

HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True)
class StepFacts:
    """One step of all ranks together."""

    step: int  # finished steps
    loss: float  # mean over the groups of ranks
    bucket_losses: dict[str, float]  # of the buckets that this step saw
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float
    clips_per_second: float
    tokens_per_second: float
    loader_wait: float  # seconds, of the rank that waited longest

    @classmethod
    def of(
        cls,
        groups: Sequence[RankFacts],
        progress: Progress,
        seconds: float,
        rate: float,
        norm: float,
        buckets: Sequence[Bucket],
    ) -> StepFacts:
        """Sums up what the groups of ranks shared."""
        by_bucket = defaultdict(list)
        for facts in groups:
            by_bucket[buckets[facts.bucket].name].append(facts.loss)
        return cls(
            progress.step,
            sum(facts.loss for facts in groups) / len(groups),
            {name: sum(losses) / len(losses) for name, losses in sorted(by_bucket.items())},
            rate,
            norm,
            seconds,
            sum(facts.clips for facts in groups) / seconds,
            sum(facts.tokens for facts in groups) / seconds,
            max(facts.waited for facts in groups),
        )


class Recorder:
    """A context manager; on ranks other than 0 it does nothing."""

    def __init__(self, config: Config, plan: StagePlan, progress: Progress, project: Path) -> None:
        self.run = os.environ.get("MLFLOW_RUN_ID")
        self._active = dist.get_rank() == 0
        self._plan = plan
        self._steps = config.training.stage(plan.stage).steps
        self._log_every = config.training.log_every
        self._losses: list[float] = []
        self._beat = 0.0
        self._log: MetricLog | None = None
        if self._active:
            if self.run:
                from magicdrive_core.tracking.runs import MetricLog, Store  # seconds to import, needed by one rank

                self._log = MetricLog(Store(config.tracking, project), self.run)
            self._metrics = plan.folder / "metrics.jsonl"
            self._resume(progress.step)

    def _resume(self, step: int) -> None:
        """Drops the lines of steps that were made after the checkpoint, and will be made again."""
        lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self._metrics.is_file() else []
        kept = [line for line in lines[:step] if line.endswith("\n")]
        self._losses = [json.loads(line)["loss"] for line in kept]
        with atomic_file(self._metrics) as partial:
            partial.write_text("".join(kept), encoding="utf-8")

    def __enter__(self) -> Recorder:
        if self._active:
            self._file = self._metrics.open("a", encoding="utf-8", buffering=1)  # a line survives a kill
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._active:
            self._file.close()
            if self._log:
                self._log.flush()

    def step(self, facts: StepFacts) -> None:
        """Records a finished step."""
        if not self._active:
            return
        self._losses.append(facts.loss)
        self._file.write(json.dumps(asdict(facts)) + "\n")
        if self._log and facts.step % self._log_every == 0:
            values = {f"loss/{name}": loss for name, loss in facts.bucket_losses.items()} | {
                "loss": facts.loss,
                "learning_rate": facts.learning_rate,
                "grad_norm": facts.grad_norm,
                "step_seconds": facts.seconds,
                "clips_per_second": facts.clips_per_second,
                "tokens_per_second": facts.tokens_per_second,
                "loader_wait_seconds": facts.loader_wait,
                "host_memory_percent": psutil.virtual_memory().percent,
            }
            self._log.metrics(values, facts.step)
        if time.monotonic() - self._beat > HEARTBEAT_SECONDS or facts.step == self._steps:
            self._beat = time.monotonic()
            left = (self._steps - facts.step) * facts.seconds
            write_json(
                self._plan.folder / "status.json",
                {
                    "stage": self._plan.stage,
                    "step": facts.step,
                    "steps": self._steps,
                    "loss": facts.loss,
                    "clips_per_second": facts.clips_per_second,
                    "seconds_left": round(left, 1),
                },
            )

    def picture(self, preview: Preview | None, network: MagicDrive, step: int) -> None:
        """Draws a preview, on the ranks that have one together."""
        if preview is None:
            return
        latents = preview.sample(network)
        if self._active:
            path = self._plan.folder / f"previews/step-{step:08d}.png"
            preview.write(latents, step, path)
            if self._log:
                self._log.picture(path)

    @property
    def losses(self) -> list[float]:
        """Of all steps so far, those before a resumption too."""
        return self._losses
