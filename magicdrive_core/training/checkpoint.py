"""Checkpoints from which training goes on exactly, on any number of ranks: how they are read.

A checkpoint is a folder ``step-<step>``: of each rank a file with its shards of all fp32 state (master weights, EMA,
Adam's moments; shards.py), one with what is not trained, the state of the run, and the digest of every file. The random
numbers of a step are functions of the seed and the step (loader.py), so that no generator has a state to keep.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import read_json, sha256_file
from magicdrive_core.training.ema import Ema
from magicdrive_core.training.shards import MOMENTS, masters, set_masters, set_moments
from magicdrive_core.training.strategy import Boosted

logger = logging.getLogger(__name__)

FIXED, STATE, MANIFEST = "fixed.safetensors", "state.json", "manifest.json"
MASTER, AVERAGE = "master", "ema"  # kinds of shards, beside MOMENTS; a shard's name is <kind>/<parameter>
HASHING_THREADS = 8


@dataclass
class Progress:
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


def load(path: Path, boosted: Boosted, ema: Ema) -> Progress:
    """Puts network, masters, moments and averages into the state of a checkpoint. Collective.

    Raises:
        MagicDriveError: the checkpoint is of another network.
    """
    state = read_json(path / STATE)
    _check_same(path, shapes(boosted), state["shapes"])
    fixed = load_file(path / FIXED)
    boosted.network.load_state_dict(fixed, strict=False)
    boosted.fixed = {name: fixed[name] for name in boosted.fixed}
    own = masters(boosted)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(path.glob("shard-*.safetensors"))]

        def read(kind: str, names: Sequence[str]) -> dict[str, Tensor]:
            return {name: _part(files, f"{kind}/{name}", own[name]) for name in names}

        set_masters(boosted, read(MASTER, list(own)))
        ema.shards = read(AVERAGE, list(own))
        steps = state["moment_steps"]
        set_moments(boosted, {kind: read(kind, list(steps)) for kind in MOMENTS}, steps)
    scale = boosted.optimizer.loss_scale
    if scale is not None:
        scale.scale, scale.good = state["loss_scale"]["scale"], state["loss_scale"]["good"]
    return Progress(**state["progress"])


def resume(folder: Path, boosted: Boosted, ema: Ema) -> Progress | None:
    """Loads the newest sound checkpoint, the same on every rank; None when there is none. Collective."""
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        for torn in folder.glob(".step-*"):  # left by a process that was killed while it wrote
            shutil.rmtree(torn)
        path = newest(folder)
        chosen = [path.name if path else None]
    dist.broadcast_object_list(chosen, src=0)
    return load(folder / chosen[0], boosted, ema) if chosen[0] else None


def shapes(boosted: Boosted) -> dict[str, list[int]]:
    """Of the network's state dict: what tells two networks apart."""
    return {name: list(tensor.shape) for name, tensor in boosted.network.state_dict().items()}


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
