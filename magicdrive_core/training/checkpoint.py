"""Checkpoints from which training goes on exactly: atomic folders with a digest of every file.

All tensors are whole and in fp32, so that another number of ranks can read them. The random numbers of a step are
functions of the seed and the step (loader.py), so that no generator has a state to keep.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_folder, read_json, sha256_file, write_json
from magicdrive_core.training.ema import Ema
from magicdrive_core.training.shards import gather, load_masters, load_moments, masters, moment_steps, moments
from magicdrive_core.training.strategy import Boosted

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGES, MOMENTS, STATE, MANIFEST = (
    "weights.safetensors",  # fp32 masters; frozen parameters and buffers as they are
    "ema.safetensors",
    "moments.safetensors",
    "state.json",
    "manifest.json",
)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # finished steps of the optimizer
    micro_batches: int = 0  # consumed by all ranks together: the sampler's position
    seconds: float = 0.0  # of training, over all attempts


def save(folder: Path, boosted: Boosted, ema: Ema, progress: Progress, keep: int) -> Path:
    """Writes ``folder/step-<step>`` and removes all but the newest ``keep`` checkpoints. Collective; rank 0 writes."""
    path = folder / f"step-{progress.step:08d}"
    weights = dict(gather(boosted, masters(boosted)))
    averages = dict(gather(boosted, ema.shards))
    adam = dict(gather(boosted, moments(boosted)))
    if dist.get_rank() == 0:
        with atomic_folder(path) as partial:
            _write_tensors(partial / WEIGHTS, weights | boosted.fixed)
            _write_tensors(partial / AVERAGES, averages)
            _write_tensors(partial / MOMENTS, adam)
            write_json(partial / STATE, {"progress": asdict(progress), "moment_steps": moment_steps(boosted)})
            write_json(partial / MANIFEST, {file.name: sha256_file(file) for file in sorted(partial.iterdir())})
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return path


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
    """Puts network, masters, moments and averages into the state of a checkpoint.

    Raises:
        MagicDriveError: the checkpoint is of another network.
    """
    weights, averages, adam = (load_file(path / name) for name in (WEIGHTS, AVERAGES, MOMENTS))
    _check_same(path, boosted.network.state_dict(), weights)
    boosted.network.load_state_dict(weights)
    boosted.fixed = {name: weights[name] for name in boosted.fixed}
    load_masters(boosted, weights)
    ema.load(averages)
    state = read_json(path / STATE)
    load_moments(boosted, adam, state["moment_steps"])
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


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _fault(path: Path) -> str | None:
    try:
        manifest = read_json(path / MANIFEST)
    except MagicDriveError as error:
        return error.message
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_file(path / name) != digest:
            return f"{name} has changed since it was written"
    return None


def _check_same(path: Path, own: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    differing = sorted(own.keys() ^ read.keys()) or [n for n in own if own[n].shape != read[n].shape]
    if differing:
        raise MagicDriveError(
            f"{path} is of another network: {differing[0]} differs ({len(differing)} in all)",
            "move the run's folder away to start anew",
        )
