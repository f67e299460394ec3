"""The training loop of all three stages, run by every rank."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.config import Config, StageConfig
from magicdrive_core.files import atomic_file, sha256_file, write_json
from magicdrive_core.launch import RESUMABLE
from magicdrive_core.model.network import MagicDrive
from magicdrive_core.rectified_flow import RectifiedFlow, keep_given
from magicdrive_core.tracking.summary import first_and_last
from magicdrive_core.training import checkpoint
from magicdrive_core.training.checkpoint import Progress
from magicdrive_core.training.ema import Ema
from magicdrive_core.training.facts import RankFacts, Stop, check_losses, of_groups, share
from magicdrive_core.training.loader import Batch, Loader
from magicdrive_core.training.mesh import Mesh
from magicdrive_core.training.plan import StagePlan
from magicdrive_core.training.preview import Preview
from magicdrive_core.training.record import Recorder, StepFacts
from magicdrive_core.training.strategy import Boosted, boost

logger = logging.getLogger(__name__)


def train(
    config: Config,
    plan: StagePlan,
    network: MagicDrive,
    loader: Loader,
    preview: Preview | None,
    stop: Stop,
    device: torch.device,
    project: Path = Path(),
) -> int:
    """Trains a stage from its newest checkpoint to its end, or until any rank is asked to stop.

    Args:
        network: before its first step, equal on all ranks.
        loader: not yet started.
        preview: on the ranks that share a clip with rank 0, where the data has a validation clip.
        stop: asked at the end of each step.
        device: of this rank.
        project: the project's folder.

    Returns:
        0, with the EMA weights and ``run.json`` in the plan's folder; or 75, with a checkpoint to resume from.

    Raises:
        MagicDriveError: a loss or gradient is not finite (no weight was touched), or a file is not usable.
    """
    training, stage = config.training, config.training.stage(plan.stage)
    mesh = Mesh.of(config.cluster.sequence_parallel)
    network.devices = mesh.devices
    boosted = boost(network, training, device)
    ema = Ema(boosted, training.ema)
    progress = checkpoint.resume(plan.folder / "checkpoints", boosted, ema) or Progress()
    logger.info("%s: from step %d of %d, %d ranks", plan.stage, progress.step, stage.steps, dist.get_world_size())
    loader.start(progress.micro_batches, mesh.groups, mesh.group, stage.steps - progress.step)
    flow = RectifiedFlow(config.flow.base_pixels)

    def save() -> None:
        checkpoint.save(plan.folder / "checkpoints", boosted, ema, progress, training.keep_checkpoints)

    with loader, Recorder(config, plan, progress, project) as recorder:
        while progress.step < stage.steps:
            began = time.perf_counter()
            batch = loader.next()
            waited = time.perf_counter() - began

            loss = flow_loss(boosted, flow, batch)
            boosted.optimizer.backward(loss)
            ranks = share(RankFacts.of(loss, batch, waited, stop), device)
            check_losses(ranks, progress.step)
            groups = of_groups(ranks, mesh.devices.size)
            rate = learning_rate(stage, progress.step)
            boosted.set_learning_rate(rate)
            boosted.optimizer.step()
            norm = boosted.optimizer.get_grad_norm()
            boosted.optimizer.zero_grad()
            ema.update()

            seconds = time.perf_counter() - began
            progress.step += 1
            progress.micro_batches += mesh.groups
            progress.seconds += seconds
            recorder.step(StepFacts.of(groups, progress, seconds, rate, norm, loader.buckets))

            last = progress.step == stage.steps
            if any(facts.stop for facts in groups) and not last:
                save()
                logger.info("asked to stop: saved at step %d", progress.step)
                return RESUMABLE
            if progress.step % training.checkpoint_every == 0 and not last:
                save()
            if progress.step % training.preview_every == 0 or last:
                with ema.applied():
                    recorder.picture(preview, network, progress.step)
        finish(plan, ema, progress, recorder)
    return 0


def flow_loss(boosted: Boosted, flow: RectifiedFlow, batch: Batch) -> Tensor:
    """Mean over the samples of the squared error of the velocity, on the frames that are noisy; formed in fp32."""
    device = boosted.device
    x_0, mask = batch.latents.to(device), None if batch.mask is None else batch.mask.to(device)
    t = flow.draw_timesteps(batch.generator, len(x_0), batch.shape).to(device)
    noise = torch.randn(x_0.shape, generator=batch.generator).to(device)
    x_t = keep_given(flow.add_noise(x_0, noise, t), x_0, mask)
    prediction = boosted.network(x_t, t, batch.conditions.to(device), mask, batch.pad_patches)
    return flow.loss(prediction, x_0, noise, mask).mean()


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, then constant; ``step`` counts from 0."""
    return stage.learning_rate * min(1.0, (step + 1) / max(1, stage.warmup))


def finish(plan: StagePlan, ema: Ema, progress: Progress, recorder: Recorder) -> None:
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
