"""Checkpoints are written while training goes on: each rank's own part, by a thread, from a copy in host memory.

The parts come together under a temporary name. Ranks tell each other at every step how far their threads are
(facts.py); once all have written, rank 0 adds the digests and renames the folder: a checkpoint is whole or not there.
A disk that is full costs this checkpoint, and not the training.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_file, read_json, sha256_file, sync_folder, write_json
from magicdrive_core.training.checkpoint import AVERAGE, FIXED, MANIFEST, MASTER, STATE, Progress, checkpoints, shapes
from magicdrive_core.training.ema import Ema
from magicdrive_core.training.shards import masters, moment_steps, moments
from magicdrive_core.training.strategy import Boosted

logger = logging.getLogger(__name__)

DIGESTS = "digests-{:05d}.json"  # of one rank's files, until rank 0 makes the manifest of them
_DISK = (OSError, SafetensorError, MagicDriveError)  # what a disk can do to a writer


class Writing(IntEnum):
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

    def __init__(self, folder: Path, boosted: Boosted, ema: Ema, keep: int, keep_every: int | None) -> None:
        self._folder, self._boosted, self._ema = folder, boosted, ema
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

    def begin(self, progress: Progress) -> None:
        """Copies the state of this moment to host memory and begins to write it; first waits for the one before."""
        self.finish()
        self._step, self._began = progress.step, time.monotonic()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            self._prepare()
        dist.barrier()
        kinds = {MASTER: masters(self._boosted), AVERAGE: self._ema.shards, **moments(self._boosted)}
        tensors = {f"{kind}/{name}": shard for kind, shards in kinds.items() for name, shard in shards.items()}
        parts = {f"shard-{rank:05d}-of-{ranks:05d}.safetensors": tensors}
        state = None
        if rank == 0:
            parts[FIXED] = self._boosted.fixed
            scale = self._boosted.optimizer.loss_scale
            state = {
                "progress": asdict(progress),
                "loss_scale": scale and asdict(scale),
                "ranks": ranks,
                "moment_steps": moment_steps(self._boosted),
                "shapes": shapes(self._boosted),
            }
        copies = {file: {name: _host_copy(tensor) for name, tensor in part.items()} for file, part in parts.items()}
        self._written = self._thread.submit(_write, self._partial, copies, state, rank)

    @property
    def state(self) -> Writing:
        """Of this rank."""
        if self._written is None:
            return Writing.IDLE
        if not self._written.done():
            return Writing.BUSY
        return Writing.DONE if self._written.exception() is None else Writing.FAILED

    def settle(self, states: Sequence[int]) -> None:
        """Puts the checkpoint in place when all ranks have written it, or drops it when one could not.

        Args:
            states: of all ranks at one moment, as each of them said.

        Raises:
            Exception: this rank's writer failed for another reason than the disk.
        """
        if Writing.IDLE in states or Writing.BUSY in states or self._written is None:
            return
        error, self._written = self._written.exception(), None
        self.seconds = time.monotonic() - self._began
        if error is not None:
            if not isinstance(error, _DISK):
                raise error
            logger.warning("checkpoint of step %d: %s", self._step, error)
        failed = [rank for rank, state in enumerate(states) if state == Writing.FAILED]
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
