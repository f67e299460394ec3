"""What rank 0 writes down of a run: metrics.jsonl (every step), status.json (heartbeat), MLflow."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from magicdrive_core.config.schema import Bucket, Config
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.training.checkpoints import TrainingProgress
from magicdrive_core.training.preview import Preview
from magicdrive_core.training.statistics import (
    BINS,
    DeviceMemory,
    RankStatistics,
    StopSource,
    fullest,
    host_memory,
    peak_tflops,
)
from magicdrive_core.utils.files import atomic_file, write_json

if TYPE_CHECKING:
    from magicdrive_core.tracking.runs import MetricLog

HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True)
class StepStatistics:
    """One step of all ranks together."""

    step: int  # finished steps
    loss: float | None  # mean over the groups of ranks; None where the step was skipped
    bucket_losses: dict[str, float]  # of the buckets that this step saw
    noise_losses: dict[str, float]  # likewise by noise level, "000-100" to "900-1000"
    skipped: list[str]  # why: what was not finite
    learning_rate: float
    grad_norm: float | None  # before clipping
    loss_scale: float | None  # of fp16, at this step
    seconds: float
    clips_per_second: float
    tokens_per_second: float
    tflops: float  # of the network, of all ranks together
    loader_wait: float  # seconds, of the rank that waited longest
    memory: DeviceMemory | None  # of the devices, the fullest of each figure

    @classmethod
    def of(
        cls,
        groups: Sequence[RankStatistics],
        progress: TrainingProgress,
        seconds: float,
        rate: float,
        norm: float | None,
        loss_scale: float | None,
        buckets: Sequence[Bucket],
        skipped: list[str],
    ) -> StepStatistics:
        """Sums up what the groups of ranks shared."""
        by_bucket, by_noise = defaultdict(list), defaultdict(list)
        everything = [each for facts in groups for each in facts.micro_batches]
        for each in everything if not skipped else ():
            by_bucket[buckets[each.bucket].name].append(each.loss)
            for noise, loss in each.by_noise:
                by_noise[f"{noise * 1000 // BINS:03d}-{(noise + 1) * 1000 // BINS:03d}"].append(loss)
        devices = [facts.memory for facts in groups if facts.memory]
        return cls(
            step=progress.step,
            loss=None if skipped else mean([facts.loss for facts in groups]),
            bucket_losses={name: mean(losses) for name, losses in sorted(by_bucket.items())},
            noise_losses={name: mean(losses) for name, losses in sorted(by_noise.items())},
            skipped=skipped,
            learning_rate=rate,
            grad_norm=norm,
            loss_scale=loss_scale,
            seconds=seconds,
            clips_per_second=sum(each.clips for each in everything) / seconds,
            tokens_per_second=sum(each.tokens for each in everything) / seconds,
            tflops=sum(each.flops for each in everything) / seconds / 1e12,
            loader_wait=max(facts.waited for facts in groups),
            memory=fullest(devices),
        )

    def metrics(self) -> dict[str, float]:
        """By their names in MLflow."""
        values = {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "loss_scale": self.loss_scale,
            "skipped_steps": float(bool(self.skipped)),
            "step_seconds": self.seconds,
            "clips_per_second": self.clips_per_second,
            "tokens_per_second": self.tokens_per_second,
            "model_tflops": self.tflops,
            "loader_wait_seconds": self.loader_wait,
        }
        values |= {f"loss/{name}": loss for name, loss in self.bucket_losses.items()}
        values |= {f"loss_at_noise/{name}": loss for name, loss in self.noise_losses.items()}
        if self.memory:
            values |= {f"device_memory/{name}_gb": size / 1e9 for name, size in asdict(self.memory).items()}
        return {name: value for name, value in values.items() if value is not None}


class Recorder:
    """A context manager; on ranks other than 0 it does nothing."""

    def __init__(
        self, config: Config, plan: StagePlan, progress: TrainingProgress, project: Path, device: torch.device
    ) -> None:
        self.run = os.environ.get("MLFLOW_RUN_ID")
        self._active = dist.get_rank() == 0
        self._plan = plan
        self._steps = config.training.stage(plan.stage).steps
        self._log_every = config.training.log_every
        training = config.training
        peak = peak_tflops(device, training.precision, training.peak_tflops)
        self._peak = peak and peak * dist.get_world_size()  # TFLOP/s of all devices
        self._window: dict[str, list[float]] = defaultdict(list)  # metrics since they were logged last
        self.losses: list[float] = []  # of all good steps so far, those before a resumption too
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
        losses = (json.loads(line)["loss"] for line in kept)
        self.losses = [loss for loss in losses if loss is not None]
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

    def step(self, facts: StepStatistics) -> None:
        """Records a finished step."""
        if not self._active:
            return
        if facts.loss is not None:
            self.losses.append(facts.loss)
        self._file.write(json.dumps(asdict(facts)) + "\n")
        if self._log:
            self._note(self._log, facts)
        if time.monotonic() - self._beat > HEARTBEAT_SECONDS or facts.step == self._steps:
            self._beat = time.monotonic()
            left = (self._steps - facts.step) * facts.seconds
            write_json(
                self._plan.folder / "status.json",
                {
                    "stage": self._plan.stage,
                    "step": facts.step,
                    "steps": self._steps,
                    "loss": self.losses[-1] if self.losses else None,
                    "clips_per_second": facts.clips_per_second,
                    "seconds_left": round(left, 1),
                },
            )

    def _note(self, log: MetricLog, facts: StepStatistics) -> None:
        """Every ``log_every`` steps the means since the last time: a bucket or noise level is not in every step."""
        for name, value in facts.metrics().items():
            self._window[name].append(value)
        if facts.step % self._log_every and facts.step != self._steps:
            return
        values = {name: mean(those) for name, those in self._window.items()}
        values["skipped_steps"] = sum(self._window["skipped_steps"])
        if self._peak:
            values["model_flops_utilisation"] = values["model_tflops"] / self._peak
        values |= {f"host_memory/{name}_gb": size / 1e9 for name, size in host_memory().items()}
        log.metrics(values, facts.step)
        self._window.clear()

    def picture(self, preview: Preview | None, network: MagicDrive, step: int, stop: StopSource) -> None:
        """Draws a preview, on the ranks that have one together; it is left out when one of them is asked to stop."""
        latents = preview.sample(network, stop) if preview is not None else None
        if preview is None or latents is None or not self._active:
            return
        path = self._plan.folder / f"previews/step-{step:08d}.png"
        if preview.write(latents, step, path, stop) and self._log:
            self._log.picture(path)
