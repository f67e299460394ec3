"""The training loop of all three stages, run by every rank.

One step, top to bottom in ``train``: the passes over this rank's micro-batches (``flow_loss`` has the loss), one
exchange between the ranks, the update unless something is not finite, the record; then a checkpoint, a preview, a stop.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.config.schema import Config, StageConfig
from magicdrive_core.diffusion.rectified_flow import RectifiedFlow, restore_conditioning_frames
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel import control
from magicdrive_core.parallel.gradient_order import arrival_order
from magicdrive_core.parallel.mesh import Mesh
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.tracking.runs import first_and_last
from magicdrive_core.training.checkpoints import Saver, TrainingProgress, checkpoints, resume, step_of
from magicdrive_core.training.engine import Engine, build_engine
from magicdrive_core.training.guard import Guard
from magicdrive_core.training.loader import Batch, Loader
from magicdrive_core.training.lora import draw_dropout, merge, write_adapters
from magicdrive_core.training.preview import Preview
from magicdrive_core.training.recorder import Recorder, StepStatistics
from magicdrive_core.training.state import Ema
from magicdrive_core.training.statistics import (
    MicroBatchStatistics,
    RankStatistics,
    StopSource,
    device_memory,
    gather_statistics,
    merge_groups,
    stop_requested_on_any_rank,
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
) -> int:
    """Train a stage from its newest checkpoint to its end, or until any rank is requested to stop.

    Args:
        config: all settings of the run.
        plan: the stage, its folder and its fingerprint.
        network: before its first step, equal on all ranks.
        loader: not yet started.
        preview: on rank 0 and the ranks that share its clips, where the data has a validation clip.
        stop: checked at the end of each step, and during and after a preview.
        device: this rank's device.

    Returns:
        0, with the EMA weights and ``run.json`` in the plan's folder; or 75 (``RESUMABLE``), with a checkpoint.

    Raises:
        MagicDriveError: no finite loss and gradient for several steps (no weight was changed), or an unusable file.
    """
    training, stage = config.training, config.training.stage(plan.stage)
    mesh = Mesh.of(config.cluster.sequence_parallel_of(plan.stage))
    order = control.from_leader(arrival_order(network))
    parallelize(
        network,
        sequence_group=mesh.sequence_group,
        recompute_every=int(stage.checkpoint_blocks),
        compile_backend=training.compile,
    )
    engine = build_engine(network, training, device, order)
    ema = Ema(engine, training.ema)
    folder = plan.folder / "checkpoints"
    progress = resume(folder, engine, ema) or TrainingProgress()
    logger.info("%s: from step %d of %d, %d ranks", plan.stage, progress.step, stage.steps, dist.get_world_size())
    left = stage.accumulate * (stage.steps - progress.step)
    loader.start(progress.micro_batches, mesh.groups, mesh.group, left, mesh.sequence_group)
    guard = Guard(plan, training.max_skipped, engine.optimizer.loss_scale)
    saver = Saver(folder, engine, ema, training.keep_checkpoints, training.keep_every)
    checkpoint_due = False

    with loader, saver, Recorder(config, plan, progress, device) as recorder:
        stopping = stop_requested_on_any_rank(stop)  # while all of the above was made
        while progress.step < stage.steps and not stopping:
            started = time.perf_counter()

            # Forward and backward passes. The gradient is that of the mean loss of the micro-batches.
            batches, losses, waited = [], [], 0.0
            for _ in range(stage.accumulate):
                called = time.perf_counter()
                batch = loader.next()
                waited += time.perf_counter() - called
                if training.lora is not None and training.lora.dropout:
                    draw_dropout(network, training.lora.dropout, batch.generator)
                batches.append(batch)
                losses.append(flow_loss(engine, batch))
                engine.optimizer.backward(losses[-1].mean() / stage.accumulate)
            read, gradients = engine.optimizer.read_passes(losses)  # the step's one synchronisation with the device

            # Every rank learns what all ranks know of this step: from here on all of them decide the same.
            logs = recorder.logs(progress.step + 1)
            own = RankStatistics(
                [MicroBatchStatistics.of(*each) for each in zip(read, batches, strict=True)],
                gradients=gradients,
                waited=waited,
                stop=stop.requested,
                write_status=saver.status,
                memory=device_memory(device) if logs else None,
            )
            ranks = gather_statistics(own)
            saver.settle([each.write_status for each in ranks])

            # Update, unless a loss or gradient of any rank is not finite.
            rate = learning_rate(stage, progress.step)
            loss_scale = engine.optimizer.loss_scale and engine.optimizer.loss_scale.scale
            faults = guard.check(progress.step, ranks, rate)
            norm = None
            if not faults:
                engine.set_learning_rate(rate)
                engine.optimizer.step()
                norm = float(engine.optimizer.get_grad_norm())
                ema.update()
            engine.optimizer.zero_grad()

            seconds = time.perf_counter() - started
            progress.step += 1
            progress.micro_batches += mesh.groups * stage.accumulate
            progress.seconds += seconds
            groups = merge_groups(ranks, mesh.sequence_parallel)
            recorder.record(
                StepStatistics.of(groups, progress, seconds, rate, norm, loss_scale, loader.buckets, faults)
            )

            # Checkpoint, only of a good step: when one is due, or before a stop.
            last = progress.step == stage.steps
            checkpoint_due = checkpoint_due or progress.step % training.checkpoint_every == 0
            stopping = any(each.stop for each in ranks)
            if guard.clean and not last and (checkpoint_due or stopping):
                saver.start(progress)
                checkpoint_due = False
            if stopping or last or guard.exhausted:
                saver.finish()
            if guard.exhausted:
                raise guard.give_up()

            # Preview.
            if last or (not stopping and progress.step % training.preview_every == 0):
                with ema.applied():
                    recorder.draw_preview(preview, network, progress.step, stop)
                stopping = stop_requested_on_any_rank(stop)  # now: the grace may be shorter than another step
                if stopping and guard.clean and not last:
                    saver.start(progress)
                    saver.finish()

        if progress.step < stage.steps:
            saved = [step for step in map(step_of, checkpoints(folder)) if step <= progress.step]
            what = f"checkpoint saved at step {saved[-1]}" if saved else "no checkpoint yet"
            logger.info("stop requested: %s; run the same command to resume", what)
            return RESUMABLE
        write_result(config, plan, ema, progress, recorder)
    return 0


def flow_loss(engine: Engine, batch: Batch) -> Tensor:
    """Compute the squared error of the velocity on the noisy frames of a micro-batch.

    Noise level, noisy latents, target and error are fp32, whatever precision the network computes in: the published
    system forms them in bf16, which moves a level of 993.2 to 992 (golden notes, oddity 5).

    Args:
        engine: the network, and the device to which the batch is copied.
        batch: with clean latents (B, V, C, T, h, w), noise levels and noise.

    Returns:
        For each sample the loss (B) on the device, 0 where no frame is noisy.
    """
    batch = batch.to(engine.device)
    x_0, noise = batch.latents, batch.noise
    x_t = restore_conditioning_frames(RectifiedFlow.add_noise(x_0, noise, batch.t), x_0, batch.mask)
    prediction = engine.network(x_t, batch.t, batch.conditions, batch.mask)
    return RectifiedFlow.loss(prediction, x_0, noise, batch.mask)


def learning_rate(stage: StageConfig, step: int) -> float:
    """Return the learning rate of a step: it rises linearly during the warm-up and falls linearly during the decay.

    Args:
        stage: the rate between them, and the lengths of warm-up and decay in steps; 0 steps: there is none.
        step: number of the step, counted from 0.
    """
    rise, fall = (step + 1) / max(1, stage.warmup), (stage.steps - step) / max(1, stage.decay)
    return stage.learning_rate * min(1.0, rise, fall)


def write_result(config: Config, plan: StagePlan, ema: Ema, progress: TrainingProgress, recorder: Recorder) -> None:
    """Write the EMA weights, and then ``run.json``, which marks the stage as finished. Collective; rank 0 writes.

    Adapters are written by themselves, and merged into the weights.

    Args:
        config: all settings of the run.
        plan: the stage, with its folder, fingerprint and inputs.
        ema: averages that become the stage's weights.
        progress: finished steps and seconds, for ``run.json``.
        recorder: has the losses of all good steps.
    """
    state = ema.gather()
    if dist.get_rank() == 0:
        lora = config.training.lora
        if lora is not None:
            write_adapters(state, list(ema.shards), lora, plan.folder / "adapter")
            state = merge(state, lora)
        with atomic_file(plan.weights) as partial:
            save_file(state, partial)
        first, last = first_and_last(recorder.losses)
        result = {
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
        }
        write_json(plan.result, result)
        logger.info("finished: loss %.4f -> %.4f, %s", first, last, plan.weights)
    control.barrier()
