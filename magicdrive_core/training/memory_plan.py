"""The device memory of training, planned without a device.

The real network, ColossalAI's ZeRO-2 and the loop's loss run one micro-batch forward and backward on torch's meta
tensors, as one rank of a simulated process group: every operation and collective returns tensors of the right size that
hold nothing. ``LiveMemory`` counts the bytes of all tensors in memory after each operation, so that a plan holds what
the code does and not what a formula says: weights, masters, Adam's moments, the moving average, gradient buckets, what
activation checkpointing keeps, and the tokens that sequence parallelism sends.

A device needs more than its tensors: the driver's context, workspaces of kernels, fragmentation, NCCL's buffers.
``RESERVE`` of it is left for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator, set_accelerator
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from magicdrive_core.config.schema import Bucket, Config, Stage, parse_size
from magicdrive_core.encoders.vae import latent_shape
from magicdrive_core.errors import UsageError
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.memory_plan import LiveMemory, fused_attention
from magicdrive_core.model.build import build_network
from magicdrive_core.model.config import NetworkConfig
from magicdrive_core.model.inputs import blank_conditions
from magicdrive_core.parallel.gradient_order import arrival_order
from magicdrive_core.parallel.mesh import Mesh
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.training.budget import SLOTS
from magicdrive_core.training.engine import Engine, GlooAccelerator, build_engine
from magicdrive_core.training.loader import Batch
from magicdrive_core.training.loop import flow_loss
from magicdrive_core.training.lora import add_adapters
from magicdrive_core.training.state import Ema, masters
from magicdrive_core.training.trainable import freeze_parameters
from magicdrive_core.utils.files import read_json

RESERVE = 0.1  # share of a device that tensors leave free
PUBLISHED_ENCODERS = 16, 4096  # latent channels of CogVideoX-2b's VAE, width of T5-v1.1-XXL
META = torch.device("meta")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one device while a micro-batch of one bucket is trained, at the peak.

    Attributes:
        weights: of the network, in the working precision, with buffers.
        masters: this rank's shard of the fp32 master weights and of Adam's two moments.
        ema: this rank's shard of the moving average.
        batch: latents, conditions and noise levels of the micro-batch.
        activations: what the forward and the backward pass hold, with gradients and their buckets.
    """

    weights: int
    masters: int
    ema: int
    batch: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes of all parts together."""
        return sum(asdict(self).values())

    def fits(self, device_bytes: float) -> bool:
        """Whether a device has room for the peak, with ``RESERVE`` of it left.

        Args:
            device_bytes: memory of the device.
        """
        return self.peak <= (1 - RESERVE) * device_bytes


class _MetaAccelerator(GlooAccelerator):
    """ColossalAI's accelerator whose device holds nothing."""

    def get_current_device(self) -> torch.device:
        return META


class TrainingPlanner:
    """Plans the buckets of one stage; a context manager, which holds a simulated process group meanwhile.

    Args:
        config: the settings; ``cluster`` gives the ranks and who shares a clip.
        stage: the stage.
        project: the project's folder; its encoders give the sizes of latents and text features. Where it has none, the
            settings do, and else those of CogVideoX-2b and T5-v1.1-XXL.

    Raises:
        UsageError: this process is in a process group already.
    """

    def __init__(self, config: Config, stage: Stage, project: Path = Path()) -> None:
        if dist.is_initialized():
            raise UsageError("memory cannot be planned inside a process group", "plan it in a process of its own")
        self._config, self._stage, self._project = config, stage, project

    def __enter__(self) -> TrainingPlanner:
        self._accelerator = get_accelerator()
        set_accelerator(_MetaAccelerator())
        dist.init_process_group("fake", rank=0, world_size=self._config.cluster.world, store=FakeStore())
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
        set_accelerator(self._accelerator)

    def plan(self, bucket: Bucket) -> TrainingMemory:
        """Plan one micro-batch of a bucket.

        Args:
            bucket: size, length and number of the clips.

        Returns:
            The bytes of one device.
        """
        config, stage = self._config, self._config.training.stage(self._stage)
        training = config.training.model_copy(update={"overlap_communication": False})  # there are no streams
        with META:
            network = build_network(network_config(config, self._stage, self._project))
            if stage.freeze_text:
                network.y_embedder.requires_grad_(False)
            freeze_parameters(network, training, self._stage)
            if training.lora is not None:
                add_adapters(network, training.lora)
        order = arrival_order(network)
        memory = LiveMemory("meta")
        memory.hold([*network.parameters(), *network.buffers()])
        with fused_attention(), memory:
            mesh = Mesh.of(config.cluster.sequence_parallel_of(self._stage))
            parallelize(network, sequence_group=mesh.sequence_group, recompute_every=int(stage.checkpoint_blocks))
            engine = build_engine(network, training, META, order)
            ema = Ema(engine, config.training.ema)
            moments = [torch.zeros_like(master) for master in masters(engine).values() for _ in range(2)]
            weights = _bytes([*network.parameters(), *network.buffers(), *engine.fixed.values()])
            averages = _bytes(ema.shards.values())
            batch = blank_batch(config, bucket, network.config, META)
            inputs = _bytes(
                value for value in [batch.latents, *vars(batch.conditions).values()] if torch.is_tensor(value)
            )
            memory.peak = memory.live
            for _ in range(min(2, stage.accumulate)):  # the second one finds the gradients of the first in memory
                train_micro_batch(engine, batch)
        kept = _bytes(masters(engine).values()) + _bytes(moments)
        return TrainingMemory(weights, kept, averages, inputs, memory.peak - weights - kept - averages - inputs)


def blank_batch(config: Config, bucket: Bucket, network: NetworkConfig, device: torch.device) -> Batch:
    """Make a micro-batch of zeros in the shapes and types of a real one.

    Args:
        config: cells of the BEV map.
        bucket: size, length and number of the clips.
        network: sizes of the network.
        device: where the tensors are.

    Returns:
        The micro-batch, with one conditioning frame mask for each clip and ``SLOTS`` box slots.
    """
    size = parse_size(bucket.resolution)
    shape = latent_shape(bucket.frames, *size)
    latents = torch.zeros(bucket.batch, len(VIEWS), network.latent_channels, *shape, device=device)
    cells = config.conditions.map_cells[bucket.resolution]
    return Batch(
        bucket=0,
        shape=(bucket.frames, *size),
        latents=latents,
        conditions=blank_conditions(
            network, bucket.frames, batch=bucket.batch, slots=SLOTS, cells=cells, device=device
        ),
        mask=torch.ones(bucket.batch, shape[0], dtype=torch.bool, device=device),
        t=torch.zeros(bucket.batch, device=device),
        noise=torch.zeros_like(latents),
        generator=torch.Generator(),
        flops=0.0,
    )


def train_micro_batch(engine: Engine, batch: Batch) -> None:
    """Run a micro-batch forward and backward, as the loop does.

    Args:
        engine: the network and its optimizer.
        batch: the micro-batch.
    """
    engine.optimizer.backward(flow_loss(engine, batch).mean())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def network_config(config: Config, stage: Stage, project: Path) -> NetworkConfig:
    """Return the sizes of a stage's network, with or without a prepared project.

    Args:
        config: sections ``model``, ``vae`` and ``text``.
        stage: the stage.
        project: the project's folder, see ``TrainingPlanner``.

    Raises:
        MagicDriveError: the project's list of encoders is not readable.
    """
    built = project / "artifacts/encoders/encoders.json"
    if built.is_file():
        encoders = read_json(built)
        channels, width = encoders["vae"]["latent_channels"], encoders["text"]["width"]
    else:
        channels, width = PUBLISHED_ENCODERS
        channels = config.vae.build.latent_channels if config.vae.build else channels
        width = config.text.build.width if config.text.build else width
    return NetworkConfig.from_settings(
        config.model,
        latent_channels=channels,
        text_width=width,
        text_tokens=config.text.max_tokens,
        stage=stage,
        published=config.published,
    )


def table_lines(config: Config, stage: Stage, device_bytes: float, project: Path = Path()) -> Iterator[str]:
    """Plan all buckets of a stage.

    Args:
        config: the settings.
        stage: the stage.
        device_bytes: memory of a device.
        project: the project's folder, see ``TrainingPlanner``.

    Yields:
        Two lines of headings, a line for each bucket in GB, and for each bucket that does not fit what would make it
        fit.
    """
    cluster, share = config.cluster, config.cluster.sequence_parallel_of(stage)
    checkpointing = "with" if config.training.stage(stage).checkpoint_blocks else "without"
    yield f"{stage}: {cluster.world} ranks, {share} for each clip, ZeRO-2, {checkpointing} activation checkpointing; GB"
    heads = ("weights", "masters", "EMA", "batch", "activations", "peak")
    yield f"{'bucket':14}{'clips':>6}" + "".join(f"{head:>13}" for head in heads)
    large = []
    with TrainingPlanner(config, stage, project) as planner:
        for bucket in config.training.stage(stage).buckets:
            memory = planner.plan(bucket)
            cells = "".join(f"{size / 1e9:13.2f}" for size in (*asdict(memory).values(), memory.peak))
            verdict = "fits" if memory.fits(device_bytes) else "does not fit"
            yield f"{bucket.name:14}{bucket.batch:6}{cells}  {verdict} {device_bytes / 1e9:g} GB"
            if not memory.fits(device_bytes):
                large.append(bucket)
    for bucket in large:
        yield f"{bucket.name}: {remedy(config, stage, bucket, device_bytes, project)}"


def remedy(config: Config, stage: Stage, bucket: Bucket, device_bytes: float, project: Path = Path()) -> str:
    """Find the setting that makes a bucket fit.

    Args:
        config: the settings, with which it does not fit.
        stage: the stage.
        bucket: one of its buckets.
        device_bytes: memory of a device.
        project: the project's folder, see ``TrainingPlanner``.

    Returns:
        A hint: activation checkpointing if that is enough, else the least number of ranks that share a clip, else a
        smaller batch.
    """
    world, heads = config.cluster.world, config.model.heads
    shares = [n for n in range(1, min(world, heads) + 1) if world % n == 0 and heads % n == 0]
    for share in (n for n in shares if n >= config.cluster.sequence_parallel_of(stage)):
        changed = _changed(config, stage, share)
        with TrainingPlanner(changed, stage, project) as planner:
            if not planner.plan(bucket).fits(device_bytes):
                continue
        settings = (
            [] if config.training.stage(stage).checkpoint_blocks else [f"training.{stage}.checkpoint_blocks=true"]
        )
        if share > config.cluster.sequence_parallel_of(stage):
            settings.append(f"cluster.sequence_parallel={{{stage}: {share}}}")
        return f"set {' and '.join(settings)}"
    return f"reduce its batch of {bucket.batch}, or use more ranks"


def _changed(config: Config, stage: Stage, share: int) -> Config:
    """Return the settings with activation checkpointing, and ``share`` ranks for each clip of the stage."""
    stages: dict[str, object] = {stage: config.training.stage(stage).model_copy(update={"checkpoint_blocks": True})}
    cluster = config.cluster.model_copy(update={"sequence_parallel": {stage: share}})
    return config.model_copy(update={"training": config.training.model_copy(update=stages), "cluster": cluster})


def check_device(config: Config, stage: Stage, device_bytes: float, project: Path = Path()) -> None:
    """Plan the stage's most expensive buckets: that of most tokens, and that of the largest maps.

    Args:
        config: the settings.
        stage: the stage.
        device_bytes: memory of a device.
        project: the project's folder, see ``TrainingPlanner``.

    Raises:
        UsageError: one of them does not fit; the hint names the setting that makes it fit.
    """
    buckets = config.training.stage(stage).buckets

    def tokens(bucket: Bucket) -> int:
        height, width = parse_size(bucket.resolution)
        return bucket.batch * latent_shape(bucket.frames, height, width)[0] * height * width

    def cells(bucket: Bucket) -> int:
        return bucket.batch * bucket.frames * config.conditions.map_cells[bucket.resolution] ** 2

    largest = {bucket.name: bucket for bucket in (max(buckets, key=tokens), max(buckets, key=cells))}
    for bucket in largest.values():
        with TrainingPlanner(config, stage, project) as planner:
            peak = planner.plan(bucket)
        if not peak.fits(device_bytes):
            raise UsageError(
                f"{stage}: {bucket.batch} clips of {bucket.name} take {peak.peak / 1e9:.1f} GB of a device, which has"
                f" {device_bytes / 1e9:g} GB, of which a tenth stays free",
                remedy(config, stage, bucket, device_bytes, project),
            )
