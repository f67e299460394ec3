"""Checkpoints from which training goes on exactly, on any number of ranks: how they are read.

A checkpoint is a folder ``step-<step>``: of each rank a file with its shards of all fp32 state (master weights, EMA,
Adam's moments; shards.py), one with what is not trained, the state of the run, and the digest of every file. The random
numbers of a step are functions of the seed and the step (loader.py), so that no generator has a state to keep.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.training.engine import Engine
from magicdrive_core.training.state import MOMENTS, Ema, masters, moment_steps, moments, set_masters, set_moments
from magicdrive_core.utils.files import atomic_file, read_json, sha256_file, sync_folder, write_json

logger = logging.getLogger(__name__)

FIXED, STATE, MANIFEST = "fixed.safetensors", "state.json", "manifest.json"
MASTER, AVERAGE = "master", "ema"  # kinds of shards, beside MOMENTS; a shard's name is <kind>/<parameter>
HASHING_THREADS = 8


@dataclass
class TrainingProgress:
    """How far a run has come."""

    step: int = 0  # finished steps, skipped ones too
    micro_batches: int = 0  # consumed by all ranks together: the sampler's position
    seconds: float = 0.0  # of training, over all attempts


def checkpoints(folder: Path) -> list[Path]:
    """Those below ``folder``, oldest first, unverified."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are reported and passed over."""
    for path in reversed(checkpoints(folder)):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged (%s): the one before it is used", path, fault)
    return None


def load(path: Path, engine: Engine, ema: Ema) -> TrainingProgress:
    """Puts network, masters, moments and averages into the state of a checkpoint. Collective.

    Raises:
        MagicDriveError: the checkpoint is of another network.
    """
    state = read_json(path / STATE)
    _check_same(path, shapes(engine), state["shapes"])
    fixed = load_file(path / FIXED)
    engine.network.load_state_dict(fixed, strict=False)
    engine.fixed = {name: fixed[name] for name in engine.fixed}
    own = masters(engine)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(path.glob("shard-*.safetensors"))]

        def read(kind: str, names: Sequence[str]) -> dict[str, Tensor]:
            return {name: _part(files, f"{kind}/{name}", own[name]) for name in names}

        set_masters(engine, read(MASTER, list(own)))
        ema.shards = read(AVERAGE, list(own))
        steps = state["moment_steps"]
        set_moments(engine, {kind: read(kind, list(steps)) for kind in MOMENTS}, steps)
    scale = engine.optimizer.loss_scale
    if scale is not None:
        scale.scale, scale.good = state["loss_scale"]["scale"], state["loss_scale"]["good"]
    return TrainingProgress(**state["progress"])


def resume(folder: Path, engine: Engine, ema: Ema) -> TrainingProgress | None:
    """Loads the newest sound checkpoint, the same on every rank; None when there is none. Collective."""
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        for torn in folder.glob(".step-*"):  # left by a process that was killed while it wrote
            shutil.rmtree(torn)
        path = newest(folder)
        chosen = [path.name if path else None]
    dist.broadcast_object_list(chosen, src=0)
    return load(folder / chosen[0], engine, ema) if chosen[0] else None


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Of the network's state dict: what tells two networks apart."""
    return {name: list(tensor.shape) for name, tensor in engine.network.state_dict().items()}


def _part(files: Sequence[Any], name: str, like: Tensor) -> Tensor:
    """This rank's part of a flat tensor that lies cut over ``files``, in the form, type and place of ``like``.

    The ranks that wrote filled the last parts up with zeros, to another length where they were of another number.
    """
    begin = dist.get_rank() * like.numel()
    pieces, end = [torch.empty(0)], 0
    for file in files:
        piece = file.get_slice(name)
        start, end = end, end + piece.get_shape()[0]
        low, high = max(begin, start), min(begin + like.numel(), end)
        if low < high:
            pieces.append(piece[low - start : high - start])
    part = torch.cat(pieces)
    return functional.pad(part, (0, like.numel() - len(part))).to(like)


def _fault(path: Path) -> str | None:
    try:
        manifest = read_json(path / MANIFEST)
    except MagicDriveError as error:
        return error.message
    missing = [name for name in manifest if not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    with ThreadPoolExecutor(HASHING_THREADS) as threads:  # hashing tens of GB takes a minute on one core
        digests = threads.map(lambda name: sha256_file(path / name), manifest)
        changed = [name for name, digest in zip(manifest, digests, strict=True) if digest != manifest[name]]
    return f"{changed[0]} has changed since it was written" if changed else None


def _check_same(path: Path, own: dict[str, list[int]], read: dict[str, list[int]]) -> None:
    differing = sorted(own.keys() ^ read.keys()) or [name for name in own if own[name] != read[name]]
    if differing:
        raise MagicDriveError(
            f"{path} is of another network: {differing[0]} differs ({len(differing)} in all)",
            "move the run's folder away to start anew",
        )


# Checkpoints are written while training goes on: each rank's own part, by a thread, from a copy in host memory.
#
# The parts come together under a temporary name. Ranks tell each other at every step how far their threads are
# (facts.py); once all have written, rank 0 adds the digests and renames the folder: a checkpoint is whole or not there.
# A disk that is full costs this checkpoint, and not the training.

DIGESTS = "digests-{:05d}.json"  # of one rank's files, until rank 0 makes the manifest of them
_DISK = (OSError, SafetensorError, MagicDriveError)  # what a disk can do to a writer


class WriteStatus(IntEnum):
    """How far a rank's thread is with the checkpoint that was begun last."""

    IDLE = 0  # there is none, or it was settled
    BUSY = 1
    DONE = 2
    FAILED = 3


class Saver:
    """Writes and keeps the checkpoints of a run. A context manager; all ranks make every call, in one order.

    Args:
        folder: of the checkpoints.
        keep: so many of the newest remain.
        keep_every: steps; of each so many, the first checkpoint remains for good. None: none does.
    """

    def __init__(self, folder: Path, engine: Engine, ema: Ema, keep: int, keep_every: int | None) -> None:
        self._folder, self._engine, self._ema = folder, engine, ema
        self._keep, self._keep_every = keep, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._step = 0
        self._began = 0.0
        self.seconds = 0.0  # that the last one took

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()

    def begin(self, progress: TrainingProgress) -> None:
        """Copies the state of this moment to host memory and begins to write it; first waits for the one before."""
        self.finish()
        self._step, self._began = progress.step, time.monotonic()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            self._prepare()
        dist.barrier()
        kinds = {MASTER: masters(self._engine), AVERAGE: self._ema.shards, **moments(self._engine)}
        tensors = {f"{kind}/{name}": shard for kind, shards in kinds.items() for name, shard in shards.items()}
        parts = {f"shard-{rank:05d}-of-{ranks:05d}.safetensors": tensors}
        state = None
        if rank == 0:
            parts[FIXED] = self._engine.fixed
            scale = self._engine.optimizer.loss_scale
            state = {
                "progress": asdict(progress),
                "loss_scale": scale and asdict(scale),
                "ranks": ranks,
                "moment_steps": moment_steps(self._engine),
                "shapes": shapes(self._engine),
            }
        copies = {file: {name: _host_copy(tensor) for name, tensor in part.items()} for file, part in parts.items()}
        self._written = self._thread.submit(_write, self._partial, copies, state, rank)

    @property
    def state(self) -> WriteStatus:
        """Of this rank."""
        if self._written is None:
            return WriteStatus.IDLE
        if not self._written.done():
            return WriteStatus.BUSY
        return WriteStatus.DONE if self._written.exception() is None else WriteStatus.FAILED

    def settle(self, states: Sequence[int]) -> None:
        """Puts the checkpoint in place when all ranks have written it, or drops it when one could not.

        Args:
            states: of all ranks at one moment, as each of them said.

        Raises:
            Exception: this rank's writer failed for another reason than the disk.
        """
        if WriteStatus.IDLE in states or WriteStatus.BUSY in states or self._written is None:
            return
        error, self._written = self._written.exception(), None
        self.seconds = time.monotonic() - self._began
        if error is not None:
            if not isinstance(error, _DISK):
                raise error
            logger.warning("checkpoint of step %d: %s", self._step, error)
        failed = [rank for rank, state in enumerate(states) if state == WriteStatus.FAILED]
        if dist.get_rank() == 0:
            self._put_in_place(failed)

    def finish(self) -> None:
        """Waits until a checkpoint that was begun is in place, or dropped, on all ranks."""
        if self._written is not None:  # on all ranks
            self._written.exception()  # waits
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, int(self.state))
            self.settle(states)
        # Rank 0 may still be putting in place what was settled here or at the last step: others would look for it in
        # vain, and a rank that ended before would have that one ended too.
        dist.barrier()

    @property
    def _partial(self) -> Path:
        return self._folder / f".step-{self._step:08d}.partial"

    def _prepare(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:  # the writers will find no folder, and say so
            logger.warning("%s cannot be made: %s", self._partial, error)

    def _put_in_place(self, failed: list[int]) -> None:
        path = self._folder / f"step-{self._step:08d}"
        try:
            if failed:
                raise MagicDriveError(f"rank {', '.join(map(str, failed))} could not write")
            manifest: dict[str, str] = {}
            for rank in range(dist.get_world_size()):
                digests = self._partial / DIGESTS.format(rank)
                manifest |= read_json(digests, "is runs/ one folder for all hosts?")
                digests.unlink()
            write_json(self._partial / MANIFEST, manifest)
            shutil.rmtree(path, ignore_errors=True)  # of an earlier attempt; damaged, or it would have been used
            self._partial.replace(path)
            sync_folder(self._folder)
            self._drop_old()
        except _DISK as error:
            logger.warning("no checkpoint of step %d: %s; training goes on to the next one", self._step, error)
            shutil.rmtree(self._partial, ignore_errors=True)

    def _drop_old(self) -> None:
        """All but the newest ``keep``, and the first of each ``keep_every`` steps."""
        first: dict[int, Path] = {0: self._folder}  # none of the beginning
        if self._keep_every:
            for path in checkpoints(self._folder):
                first.setdefault(int(path.name.removeprefix("step-")) // self._keep_every, path)
        for old in checkpoints(self._folder)[: -self._keep]:
            if old not in first.values():
                shutil.rmtree(old)


def _write(folder: Path, parts: dict[str, dict[str, Tensor]], state: dict[str, Any] | None, rank: int) -> None:
    """In the thread: the files of this rank, synced, then their digests."""
    for name, tensors in parts.items():
        with atomic_file(folder / name) as file:
            save_file(tensors, file)
    if state is not None:
        write_json(folder / STATE, state)
    names = [*parts, *([STATE] if state is not None else [])]
    write_json(folder / DIGESTS.format(rank), {name: sha256_file(folder / name) for name in names})


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
