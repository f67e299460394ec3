"""What rank 0 writes about a run: metrics.jsonl (every step), status.json (heartbeat), previews.

The launcher sends them to MLflow (delivery.py): no rank waits for a server, and none needs the network for it. No disk
ends a training here: what it refuses is written later.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean as mean

import psutil
import torch
import torch.distributed as dist

from magicdrive_core.config.schema import Bucket, Config
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.training.checkpoints import TrainingProgress
from magicdrive_core.training.metrics_file import METRICS, MetricsFile
from magicdrive_core.training.preview import Preview
from magicdrive_core.training.statistics import NOISE_BINS, DeviceMemory, RankStatistics, StopSource, largest
from magicdrive_core.utils.files import write_unsynced
from magicdrive_core.utils.memory import memory_left, memory_limit

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
# Dense TFLOP/s in bf16 from the vendors' data sheets, the same in fp16; the longest name that fits counts.
PEAK_TFLOPS = {"A100": 312.0, "A800": 312.0, "H100": 989.0, "H800": 989.0, "H200": 989.0, "H20": 148.0, "L40S": 362.0}


@dataclass(frozen=True)
class StepStatistics:
    """One step of all ranks together: a line of metrics.jsonl.

    Attributes:
        step: finished steps.
        loss: mean over the groups of ranks; None where the step was skipped.
        bucket_losses: mean loss of each bucket that this step saw.
        noise_losses: mean loss by noise level, "000-100" to "900-1000".
        skipped: why the step was skipped; empty for a good step.
        learning_rate: the step's rate.
        grad_norm: before clipping; None where the step was skipped.
        loss_scale: fp16's loss scale at this step; None in other precisions.
        seconds: duration of the step.
        clips_per_second: clips of all ranks together, over the duration of the step.
        tokens_per_second: tokens of all ranks together, over the duration of the step.
        tflops: TFLOP/s of the network on all ranks together.
        loader_wait: seconds that the slowest loader was waited for.
        memory: the largest of each figure over the devices; None on CPUs, and at steps that do not log.
    """

    step: int
    loss: float | None
    bucket_losses: dict[str, float]
    noise_losses: dict[str, float]
    skipped: list[str]
    learning_rate: float
    grad_norm: float | None
    loss_scale: float | None
    seconds: float
    clips_per_second: float
    tokens_per_second: float
    tflops: float
    loader_wait: float
    memory: DeviceMemory | None

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
        """Sum up a step.

        Args:
            groups: statistics of each group of ranks that shares clips.
            progress: how far the run is after the step.
            seconds: duration of the step.
            rate: the learning rate.
            norm: norm of the gradient before clipping; None where the step was skipped.
            loss_scale: fp16's at this step; None in other precisions.
            buckets: the loader's, in the order of the indices in ``groups``.
            skipped: why the step was skipped, a line for each faulty rank; empty for a good step.

        Returns:
            The step as a line of metrics.jsonl; without losses where it was skipped.
        """
        by_bucket, by_noise = defaultdict(list), defaultdict(list)
        micro_batches = [each for group in groups for each in group.micro_batches]
        for each in micro_batches if not skipped else ():
            by_bucket[buckets[each.bucket].name].append(each.loss)
            for noise, loss in each.by_noise:
                by_noise[f"{noise * 1000 // NOISE_BINS:03d}-{(noise + 1) * 1000 // NOISE_BINS:03d}"].append(loss)
        return cls(
            step=progress.step,
            loss=None if skipped else mean([group.loss for group in groups]),
            bucket_losses={name: mean(losses) for name, losses in sorted(by_bucket.items())},
            noise_losses={name: mean(losses) for name, losses in sorted(by_noise.items())},
            skipped=skipped,
            learning_rate=rate,
            grad_norm=norm,
            loss_scale=loss_scale,
            seconds=seconds,
            clips_per_second=sum(each.clips for each in micro_batches) / seconds,
            tokens_per_second=sum(each.tokens for each in micro_batches) / seconds,
            tflops=sum(each.flops for each in micro_batches) / seconds / 1e12,
            loader_wait=max(group.waited for group in groups),
            memory=largest([group.memory for group in groups if group.memory]),
        )


class Recorder:
    """Writes a run's metrics, heartbeat and previews. A context manager; on ranks other than 0 it does nothing.

    Args:
        config: all settings of the run.
        plan: the stage, in whose folder the files are.
        progress: where the run resumes; lines of later steps are dropped, as these steps are made again.
        device: this rank's device.

    Attributes:
        losses: of all good steps so far, those before a resumption too.
    """

    def __init__(self, config: Config, plan: StagePlan, progress: TrainingProgress, device: torch.device) -> None:
        self._plan = plan
        self._steps = config.training.stage(plan.stage).steps
        self._log_every = config.training.log_every
        training = config.training
        peak = peak_tflops(device, training.precision, training.peak_tflops)
        self._peak = peak and peak * dist.get_world_size()  # TFLOP/s of all devices
        self._status = plan.folder / "status.json"
        self._last_heartbeat = 0.0
        self._metrics = MetricsFile(plan.folder / METRICS, progress.step) if dist.get_rank() == 0 else None
        lines = self._metrics.lines if self._metrics else []
        self.losses: list[float] = [line["loss"] for line in lines if line["loss"] is not None]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics:
            self._metrics.close()

    def record(self, statistics: StepStatistics) -> None:
        """Write a finished step to metrics.jsonl, and to status.json where it is due.

        Args:
            statistics: what the step was like, good or skipped; ignored on ranks other than 0.
        """
        if self._metrics is None:
            return
        if statistics.loss is not None:
            self.losses.append(statistics.loss)
        is_last = statistics.step == self._steps
        extra = {
            "time": time.time(),  # s since 1970
            "model_flops_utilisation": statistics.tflops / self._peak if self._peak else None,
            "host_memory": host_memory() if self.logs(statistics.step) else None,  # takes milliseconds
        }
        self._metrics.append(asdict(statistics) | extra)
        if is_last or time.monotonic() - self._last_heartbeat > HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            self._beat(statistics)

    def logs(self, step: int) -> bool:
        """Whether a step's metrics are logged; the same answer on all ranks.

        Args:
            step: number of finished steps, counted from 1.
        """
        return step % self._log_every == 0 or step == self._steps

    def _beat(self, statistics: StepStatistics) -> None:
        """Write status.json; on a full disk only its time changes, so that the launcher sees the progress."""
        status = {
            "stage": self._plan.stage,
            "step": statistics.step,
            "steps": self._steps,
            "loss": self.losses[-1] if self.losses else None,
            "clips_per_second": statistics.clips_per_second,
            "seconds_left": round((self._steps - statistics.step) * statistics.seconds, 1),
        }
        try:
            write_unsynced(self._status, json.dumps(status, indent=1).encode())
        except (OSError, MagicDriveError):  # metrics.jsonl, beside it, has told of it
            with suppress(OSError):
                os.utime(self._status)

    def draw_preview(self, preview: Preview | None, network: MagicDrive, step: int, stop: StopSource) -> None:
        """Draw a preview on the ranks that have one, unless one of them is requested to stop meanwhile.

        What goes wrong costs the preview only.

        Args:
            preview: None on ranks that take no part.
            network: with the weights to show; sampled by all ranks that share its work.
            step: finished steps, for the title and the file's name.
            stop: checked between clips.
        """
        if preview is None:
            return
        path = self._plan.folder / f"previews/step-{step:08d}.png"
        try:
            latents = preview.sample(network, stop)
            if latents is not None and self._metrics is not None:
                preview.write(latents, step, path, stop)
        except Exception as error:  # noqa: BLE001 - a picture is never worth a training
            what = "".join(traceback.format_exception_only(error)).strip()
            logger.warning("no preview of step %d: %s; training continues", step, what)


def host_memory() -> dict[str, int]:
    """Measure the host memory that is in use now.

    Returns:
        Bytes: ``rss`` and ``pss`` of this process (``pss`` divides shared pages by the number of their users; equal to
        ``rss`` where the system does not count it), and ``container``, of all processes together.
    """
    info = psutil.Process().memory_full_info()
    return {"rss": info.rss, "pss": getattr(info, "pss", info.rss), "container": memory_limit() - memory_left()}


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Return a device's peak speed for the utilisation of its arithmetic units.

    Args:
        device: this rank's device.
        precision: "bf16", "fp16" or "fp32"; the table holds the peak of 16-bit formats only.
        configured: TFLOP/s that params.yaml names, which come first; None looks into ``PEAK_TFLOPS``.

    Returns:
        Dense TFLOP/s of one device; None where neither params.yaml nor the table knows it.
    """
    if configured is not None or device.type == "cpu" or precision == "fp32":
        return configured
    name = str(torch.get_device_module(device).get_device_name(device))
    return next((PEAK_TFLOPS[known] for known in sorted(PEAK_TFLOPS, key=len, reverse=True) if known in name), None)
