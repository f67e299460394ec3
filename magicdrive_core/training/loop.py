"""The training loop of all three stages, run by every rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.config.schema import Config, StageConfig
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow, keep_given
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.mesh import Mesh
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.tracking.runs import first_and_last
from magicdrive_core.training.checkpoints import Saver, TrainingProgress, resume
from magicdrive_core.training.engine import Engine, build_engine
from magicdrive_core.training.guard import Guard
from magicdrive_core.training.loader import Batch, Loader
from magicdrive_core.training.preview import Preview
from magicdrive_core.training.recorder import Recorder, StepStatistics
from magicdrive_core.training.state import Ema
from magicdrive_core.training.statistics import (
    MicroBatchStatistics,
    RankStatistics,
    StopSource,
    any_rank_requested,
    device_memory,
    merge_groups,
    share,
)
from magicdrive_core.utils.files import atomic_file, sha256_file, write_json

logger = logging.getLogger(__name__)


def train(
    config: Config,
    plan: StagePlan,
    network: MagicDrive,
    loader: Loader,
    preview: Preview | None,
    stop: StopSource,
    device: torch.device,
    project: Path = Path(),
) -> int:
    """Trains a stage from its newest checkpoint to its end, or until any rank is asked to stop.

    Args:
        network: before its first step, equal on all ranks.
        loader: not yet started.
        preview: on the ranks that share a clip with rank 0, where the data has a validation clip.
        stop: asked at the end of each step, and in and after a preview.
        device: of this rank.
        project: the project's folder.

    Returns:
        0, with the EMA weights and ``run.json`` in the plan's folder; or 75, with a checkpoint to resume from.

    Raises:
        MagicDriveError: no finite loss and gradient for several steps (no weight was touched), or an unusable file.
    """
    training, stage = config.training, config.training.stage(plan.stage)
    mesh = Mesh.of(config.cluster.sequence_parallel)
    parallelize(
        network,
        sequence_group=mesh.sequence_group,
        checkpoint_every=int(stage.checkpoint_blocks),
        compile_backend=training.compile,
    )
    engine = build_engine(network, training, device)
    ema = Ema(engine, training.ema)
    folder = plan.folder / "checkpoints"
    progress = resume(folder, engine, ema) or TrainingProgress()
    logger.info("%s: from step %d of %d, %d ranks", plan.stage, progress.step, stage.steps, dist.get_world_size())
    left = stage.accumulate * (stage.steps - progress.step)
    loader.start(progress.micro_batches, mesh.groups, mesh.group, left, mesh.sequence_group)
    flow = RectifiedFlow(config.flow.base_pixels)
    guard = Guard(plan, training.max_skipped, engine.optimizer.loss_scale)
    saver = Saver(folder, engine, ema, training.keep_checkpoints, training.keep_every)
    due = False  # a checkpoint

    with loader, saver, Recorder(config, plan, progress, project, device) as recorder:
        stopping = any_rank_requested(stop)  # while it all was made
        while progress.step < stage.steps and not stopping:
            began = time.perf_counter()
            micro_batches, waited = passes(engine, flow, loader, stage.accumulate)
            ranks = share(
                RankStatistics(
                    micro_batches,
                    gradients=engine.optimizer.check_gradients(),
                    waited=waited,
                    stop=stop.requested,
                    writing=saver.state,
                    memory=device_memory(device),
                )
            )
            saver.settle([facts.writing for facts in ranks])
            rate = learning_rate(stage, progress.step)
            scale = engine.optimizer.loss_scale and engine.optimizer.loss_scale.scale
            faults = guard.faults(progress.step, ranks, rate)
            norm = None
            if not faults:
                engine.set_learning_rate(rate)
                engine.optimizer.step()
                norm = float(engine.optimizer.get_grad_norm())
                ema.update()
            engine.optimizer.zero_grad()

            seconds = time.perf_counter() - began
            progress.step += 1
            progress.micro_batches += mesh.groups * stage.accumulate
            progress.seconds += seconds
            groups = merge_groups(ranks, mesh.sequence_parallel)
            recorder.step(StepStatistics.of(groups, progress, seconds, rate, norm, scale, loader.buckets, faults))

            last = progress.step == stage.steps
            due = due or progress.step % training.checkpoint_every == 0
            stopping = any(facts.stop for facts in ranks)
            if guard.clean and not last and (due or stopping):
                saver.begin(progress)
                due = False
            if stopping or last or guard.exhausted:
                saver.finish()
            if guard.exhausted:
                raise guard.give_up()
            if last or (not stopping and progress.step % training.preview_every == 0):
                with ema.applied():
                    recorder.picture(preview, network, progress.step, stop)
                stopping = any_rank_requested(stop)  # another step may take longer than there is left
                if stopping and guard.clean and not last:
                    saver.begin(progress)
                    saver.finish()
        if progress.step < stage.steps:
            logger.info("asked to stop: goes on after step %d; a checkpoint took %.1f s", progress.step, saver.seconds)
            return RESUMABLE
        finish(plan, ema, progress, recorder)
    return 0


def passes(engine: Engine, flow: RectifiedFlow, loader: Loader, count: int) -> tuple[list[MicroBatchStatistics], float]:
    """Forward and backward passes of this rank's ``count`` micro-batches of a step, and the seconds it waited for them.

    The gradient is that of the mean of their losses.
    """
    facts, waited = [], 0.0
    for _ in range(count):
        began = time.perf_counter()
        batch = loader.next()
        waited += time.perf_counter() - began
        losses, t = flow_loss(engine, flow, batch)
        engine.optimizer.backward(losses.mean() / count)
        facts.append(MicroBatchStatistics.of(losses, t, batch))
    return facts, waited


def flow_loss(engine: Engine, flow: RectifiedFlow, batch: Batch) -> tuple[Tensor, Tensor]:
    """Squared error of the velocity on the frames that are noisy, and noise levels: (B) and (B).

    Noise level, noisy latents, target and error are fp32, whatever the network computes in: the published system forms
    them in bf16, which moves a level of 993.2 to 992 (golden notes, oddity 5).
    """
    device = engine.device
    x_0, mask = batch.latents.to(device), None if batch.mask is None else batch.mask.to(device)
    t = flow.draw_timesteps(batch.generator, len(x_0), batch.shape).to(device)
    noise = torch.randn(x_0.shape, generator=batch.generator).to(device)
    x_t = keep_given(flow.add_noise(x_0, noise, t), x_0, mask)
    prediction = engine.network(x_t, t, batch.conditions.to(device), mask)
    return flow.loss(prediction, x_0, noise, mask), t


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, then constant; ``step`` counts from 0."""
    return stage.learning_rate * min(1.0, (step + 1) / max(1, stage.warmup))


def finish(plan: StagePlan, ema: Ema, progress: TrainingProgress, recorder: Recorder) -> None:
    """Writes the EMA weights, and then ``run.json``, which makes the stage done. Collective; rank 0 writes."""
    state = ema.gather()
    if dist.get_rank() == 0:
        with atomic_file(plan.weights) as partial:
            save_file(state, partial)
        first, last = first_and_last(recorder.losses)
        facts = {
            "stage": plan.stage,
            "fingerprint": plan.fingerprint,
            "inputs": plan.inputs,
            "weights_sha256": sha256_file(plan.weights),
            "parameters": sum(tensor.numel() for tensor in state.values()),
            "ranks": dist.get_world_size(),
            "steps": progress.step,
            "seconds": round(progress.seconds, 1),
            "loss_first": first,
            "loss_last": last,
            "run": recorder.run,
        }
        write_json(plan.result, facts)
        logger.info("done: loss %.4f -> %.4f, %s", first, last, plan.weights)
    dist.barrier()
