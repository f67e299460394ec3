"""Checkpoints: written beside the training, and read on any number of ranks so that it resumes exactly.

A checkpoint is a folder ``step-<step>``: a file of each rank with its shards of all fp32 state (master weights, moving
average, Adam's moments; state.py), one with all that is not trained, the state of the run, and the digest of every
file. The random numbers of a step are functions of the seed and the step (loader.py), so no generator has a state.

Each rank copies its shards to host memory and a thread writes them while training continues. All files come together
in a temporary folder. The ranks tell each other at every step how far their threads are (statistics.py); when all have
written, rank 0 adds the digests and renames the folder: a checkpoint is complete or absent. A full disk costs this
checkpoint and not the training.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.parallel import control
from magicdrive_core.training.engine import Engine
from magicdrive_core.training.state import MOMENTS, Ema, masters, moment_steps, moments, set_masters, set_moments
from magicdrive_core.utils.files import atomic_file, read_json, sha256_file, sync_folder, write_json

logger = logging.getLogger(__name__)

FIXED, STATE, MANIFEST = "fixed.safetensors", "state.json", "manifest.json"
SHARD = "shard-{:05d}-of-{:05d}.safetensors"  # rank, ranks
DIGESTS = "digests-{:05d}.json"  # of one rank's files, until rank 0 merges them into the manifest
MASTER, AVERAGE = "master", "ema"  # kinds of shards, beside MOMENTS; a shard's name is <kind>/<parameter>
HASHING_THREADS = 8
_NAME = re.compile(r"step-[0-9]{8,}")
_DISK_ERRORS = (OSError, SafetensorError, MagicDriveError)  # what a disk can do to a writer


@dataclass
class TrainingProgress:
    """How far a training is.

    Attributes:
        step: finished steps, skipped ones too.
        micro_batches: used by all ranks together: the sampler's position.
        seconds: duration of all steps, over all starts.
    """

    step: int = 0
    micro_batches: int = 0
    seconds: float = 0.0


@dataclass
class LossScaleState:
    """fp16's loss scale (engine.py): its factor, and the good steps since it changed."""

    scale: float
    good: int


class CheckpointState(BaseModel):
    """What ``state.json`` holds: all state that is not a tensor.

    Attributes:
        progress: how far the run is.
        loss_scale: None in other precisions than fp16.
        ranks: number of ranks that wrote the checkpoint, a file of shards each.
        moment_steps: steps of Adam by parameter; one without a step has no moments.
        shapes: of all tensors in the network's state dict, by which another network is recognised.
    """

    model_config = ConfigDict(extra="forbid")

    progress: TrainingProgress
    loss_scale: LossScaleState | None
    ranks: int
    moment_steps: dict[str, int]
    shapes: dict[str, list[int]]


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder without verifying them.

    Args:
        folder: where a run's checkpoints are; it may be missing.

    Returns:
        Folders ``step-<step>``, oldest first; other files and folders are left out.
    """
    return [path for path in _named_like_checkpoints(folder) if path.is_dir()]


def step_of(checkpoint: Path) -> int:
    """Return the number of finished steps that a checkpoint's name tells.

    Args:
        checkpoint: a path ``step-<step>``.
    """
    return int(checkpoint.name.removeprefix("step-"))


def _named_like_checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def newest(folder: Path) -> Path | None:
    """Find the newest checkpoint that is complete and unchanged, and warn of damaged ones.

    Args:
        folder: where a run's checkpoints are.

    Returns:
        The checkpoint's folder; None without an intact one.
    """
    for path in reversed(_named_like_checkpoints(folder)):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); the previous one is used", path, fault)
    return None


def resume(folder: Path, engine: Engine, ema: Ema) -> TrainingProgress | None:
    """Load the newest intact checkpoint, the same on every rank. Collective.

    Args:
        folder: where the run's checkpoints are; partial ones are removed.
        engine: whose network, masters, moments and loss scale are set.
        ema: whose averages are set.

    Returns:
        How far the training was; None without a checkpoint, and nothing is changed then.

    Raises:
        MagicDriveError: the checkpoint belongs to another network.
    """
    chosen = None
    if dist.get_rank() == 0:
        for partial in folder.glob(".step-*.partial"):  # left by a process that was killed while it wrote
            _remove(partial)
        path = newest(folder)
        chosen = path.name if path else None
    chosen = control.from_leader(chosen)
    return load(folder / chosen, engine, ema) if chosen else None


def load(path: Path, engine: Engine, ema: Ema) -> TrainingProgress:
    """Put network, master weights, moments, averages and loss scale into the state of a checkpoint. Collective.

    Args:
        path: folder of the checkpoint, written by any number of ranks.
        engine: whose network, masters, moments and loss scale are set.
        ema: whose averages are set.

    Returns:
        How far the training was.

    Raises:
        MagicDriveError: the checkpoint belongs to another network.
    """
    state = _read_state(path)
    _check_same(path, shapes(engine), state.shapes)
    fixed = load_file(path / FIXED)
    engine.network.load_state_dict(fixed, strict=False)
    engine.fixed = {name: fixed[name] for name in engine.fixed}
    own = masters(engine)
    with ExitStack() as stack:
        names = (SHARD.format(rank, state.ranks) for rank in range(state.ranks))
        files = [stack.enter_context(safe_open(path / name, "pt")) for name in names]

        def read(kind: str, names: Sequence[str]) -> dict[str, Tensor]:
            return {name: _read_shard(files, f"{kind}/{name}", own[name]) for name in names}

        set_masters(engine, read(MASTER, list(own)))
        ema.shards = read(AVERAGE, list(own))
        steps = state.moment_steps
        set_moments(engine, {kind: read(kind, list(steps)) for kind in MOMENTS}, steps)
    scale = engine.optimizer.loss_scale
    if scale is not None and state.loss_scale is not None:
        scale.scale, scale.good = state.loss_scale.scale, state.loss_scale.good
    return state.progress


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the shapes by which a checkpoint of another network is recognised.

    Args:
        engine: holds the network.

    Returns:
        Shapes of all tensors in the network's state dict, by name.
    """
    return {name: list(tensor.shape) for name, tensor in engine.network.state_dict().items()}


def _read_shard(files: Sequence[Any], name: str, like: Tensor) -> Tensor:
    """Read this rank's shard of a flat tensor that is cut over ``files``.

    The ranks that wrote padded the tensor with zeros, to another length where their number differed.

    Args:
        files: opened, by rank.
        name: the tensor's name in the files.
        like: gives the length, dtype and device of the shard.
    """
    begin = dist.get_rank() * like.numel()
    pieces, end = [torch.empty(0)], 0
    for file in files:
        piece = file.get_slice(name)
        start, end = end, end + piece.get_shape()[0]
        low, high = max(begin, start), min(begin + like.numel(), end)
        if low < high:
            pieces.append(piece[low - start : high - start])
    shard = torch.cat(pieces)
    return functional.pad(shard, (0, like.numel() - len(shard))).to(like)


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it holds what was written into it, all of it and nothing else."""
    if not path.is_dir():
        return "it is not a folder"
    try:
        manifest = TypeAdapter(dict[str, str]).validate_python(read_json(path / MANIFEST))
    except MagicDriveError as error:
        return error.message
    except ValidationError:
        return f"{MANIFEST} is not a list of files with their digests"
    ranks = len(manifest.keys() - {FIXED, STATE})
    if not ranks or manifest.keys() != {FIXED, STATE, *(SHARD.format(rank, ranks) for rank in range(ranks))}:
        return f"{MANIFEST} does not list {FIXED}, {STATE} and the shards of all ranks"
    unknown = sorted(file.name for file in path.glob("shard-*") if file.name not in manifest)
    if unknown:
        return f"{unknown[0]} is not in {MANIFEST}"
    missing = [name for name in manifest if not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        with ThreadPoolExecutor(HASHING_THREADS) as threads:  # hashing tens of GB takes a minute on one core
            digests = dict(zip(manifest, threads.map(lambda name: sha256_file(path / name), manifest), strict=True))
        changed = [name for name in manifest if digests[name] != manifest[name]]
        if changed:
            return f"{changed[0]} has changed since it was written"
        state = _read_state(path)
    except (OSError, MagicDriveError) as error:  # such as a block of the disk that cannot be read
        return str(error)
    if (state.ranks, state.progress.step) != (ranks, step_of(path)):
        return f"{STATE} is that of step {state.progress.step} of {state.ranks} ranks"
    return None


def _read_state(path: Path) -> CheckpointState:
    """Read a checkpoint's ``state.json``.

    Raises:
        MagicDriveError: the file is missing or broken, or another version of the program wrote it.
    """
    try:
        return CheckpointState.model_validate(read_json(path / STATE))
    except ValidationError as error:
        fault = error.errors()[0]
        raise MagicDriveError(f"{path / STATE}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_same(path: Path, own: dict[str, list[int]], read: dict[str, list[int]]) -> None:
    differing = sorted(own.keys() ^ read.keys()) or [name for name in own if own[name] != read[name]]
    if differing:
        raise MagicDriveError(
            f"{path} belongs to another network: {differing[0]} differs ({len(differing)} tensors in all)",
            "move the run's folder away to start from the beginning",
        )


class WriteStatus(IntEnum):
    """How far a rank's thread is with the last checkpoint that was started."""

    IDLE = 0  # none was started, or it was settled
    BUSY = 1
    DONE = 2
    FAILED = 3


class Saver:
    """Writes and keeps the checkpoints of a run. A context manager; all ranks make every call in the same order.

    Args:
        folder: where the checkpoints are written.
        engine: whose state is saved.
        ema: whose averages are saved.
        keep: number of newest checkpoints that remain.
        keep_every: steps; the first checkpoint of each interval of this length remains for good. None keeps none.
    """

    def __init__(self, folder: Path, engine: Engine, ema: Ema, keep: int, keep_every: int | None) -> None:
        self._folder, self._engine, self._ema = folder, engine, ema
        self._keep, self._keep_every = keep, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._step = 0
        self._started = 0.0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()

    def start(self, progress: TrainingProgress) -> None:
        """Copy the present state to host memory and start to write it, after the previous checkpoint is settled.

        Args:
            progress: how far the run is; its step names the checkpoint.
        """
        self.finish()
        self._step, self._started = progress.step, time.monotonic()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            self._create_folder()
        control.barrier()
        kinds = {MASTER: masters(self._engine), AVERAGE: self._ema.shards, **moments(self._engine)}
        tensors = {f"{kind}/{name}": shard for kind, shards in kinds.items() for name, shard in shards.items()}
        parts = {SHARD.format(rank, ranks): tensors}
        state = None
        if rank == 0:
            parts[FIXED] = self._engine.fixed
            scale = self._engine.optimizer.loss_scale
            state = CheckpointState(
                progress=replace(progress),
                loss_scale=scale and LossScaleState(scale.scale, scale.good),
                ranks=ranks,
                moment_steps=moment_steps(self._engine),
                shapes=shapes(self._engine),
            )
        copies = {file: {name: _host_copy(tensor) for name, tensor in part.items()} for file, part in parts.items()}
        self._written = self._thread.submit(_write, self._partial, copies, state, rank)

    @property
    def status(self) -> WriteStatus:
        """How far this rank's thread is with the checkpoint that was started last."""
        if self._written is None:
            return WriteStatus.IDLE
        if not self._written.done():
            return WriteStatus.BUSY
        return WriteStatus.DONE if self._written.exception() is None else WriteStatus.FAILED

    def settle(self, statuses: Sequence[int]) -> None:
        """Rename the checkpoint's folder if all ranks have written it, or remove it if one of them failed.

        Args:
            statuses: what all ranks reported at one moment, by rank.

        Raises:
            Exception: this rank's writer failed for another reason than the disk.
        """
        if WriteStatus.IDLE in statuses or WriteStatus.BUSY in statuses or self._written is None:
            return
        error, self._written = self._written.exception(), None
        if error is not None:
            if not isinstance(error, _DISK_ERRORS):
                raise error
            logger.warning("checkpoint of step %d: %s", self._step, error)
        failed = [rank for rank, status in enumerate(statuses) if status == WriteStatus.FAILED]
        if dist.get_rank() == 0:
            self._publish(failed)

    def finish(self) -> None:
        """Wait until the last started checkpoint is settled on all ranks."""
        if self._written is not None:  # on all ranks
            self._written.exception()  # waits
            self.settle(control.gather(int(self.status)))
        # Rank 0 may still rename what was settled here or at the last step: other ranks would not find the folder yet,
        # and a rank that exits before would end rank 0 too.
        control.barrier()

    @property
    def _partial(self) -> Path:
        return self._folder / f".step-{self._step:08d}.partial"

    def _create_folder(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:  # the writers will find no folder, and report it
            logger.warning("cannot create %s: %s", self._partial, error)

    def _publish(self, failed: list[int]) -> None:
        """Add the manifest and rename the folder, or remove it if ranks have ``failed``; on rank 0."""
        path = self._folder / f"step-{self._step:08d}"
        try:
            if failed:
                raise MagicDriveError(f"rank {', '.join(map(str, failed))} could not write")
            manifest: dict[str, str] = {}
            for rank in range(dist.get_world_size()):
                digests = self._partial / DIGESTS.format(rank)
                manifest |= read_json(digests, "runs/ must be one shared folder for all hosts")
                digests.unlink()
            write_json(self._partial / MANIFEST, manifest)
            _remove(path)  # of an earlier start; damaged, or it would have been used
            self._partial.replace(path)
            sync_folder(self._folder)
        except _DISK_ERRORS as error:
            logger.warning("checkpoint of step %d was not saved: %s; training continues", self._step, error)
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            logger.info("checkpoint of step %d saved in %.1f s", self._step, time.monotonic() - self._started)
            self._remove_old()

    def _remove_old(self) -> None:
        """Keep the newest ``keep`` checkpoints and the first of each ``keep_every`` steps.

        Checkpoints of later steps are damaged, or the run would have resumed from them. They count for nothing here
        and are replaced when the run comes to their steps.
        """
        saved = [path for path in checkpoints(self._folder) if step_of(path) <= self._step]
        first: dict[int, Path] = {0: self._folder}  # the first interval keeps none
        if self._keep_every:
            for path in saved:
                first.setdefault(step_of(path) // self._keep_every, path)
        for old in saved[: -self._keep]:
            if old not in first.values():
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    logger.warning("the old checkpoint %s cannot be removed: %s", old, error)


def _write(folder: Path, parts: dict[str, dict[str, Tensor]], state: CheckpointState | None, rank: int) -> None:
    """Write and sync the files of this rank, then their digests; in the thread."""
    for name, tensors in parts.items():
        with atomic_file(folder / name) as file:
            save_file(tensors, file)
    if state is not None:
        write_json(folder / STATE, state.model_dump())
    names = [*parts, *([STATE] if state is not None else [])]
    write_json(folder / DIGESTS.format(rank), {name: sha256_file(folder / name) for name in names})


def _host_copy(tensor: Tensor) -> Tensor:
    """Return a copy that later steps do not change."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
