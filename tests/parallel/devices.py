"""Devices that are threads of this process: what a group of them computes, without starting processes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from magicdrive_core.model.transformer import MagicDrive
from magicdrive_core.parallel.parallelize import parallelize
from magicdrive_core.parallel.sequence_parallel import RankGroup


class ThreadGroup(RankGroup):
    """Sends through a list that all threads see. Not differentiable."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self._board, self._barrier = board, barrier

    def all_to_all(self, x: Tensor) -> Tensor:
        return self.all_gather(x)[:, self.rank]

    def all_gather(self, x: Tensor) -> Tensor:
        self._board[self.rank] = x
        self._barrier.wait()
        everyone = torch.stack(self._board)
        self._barrier.wait()
        return everyone


def on_devices(
    network: MagicDrive, size: int, work: Callable[[MagicDrive], Tensor], slice_tokens: int | None = None
) -> list[Tensor]:
    """``work`` with the network on so many devices, the result of each."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    @torch.no_grad()
    def run(rank: int) -> Tensor:
        weights = {id(each): each for each in (*network.parameters(), *network.buffers())}
        own = copy.deepcopy(network, weights)  # the same weights
        parallelize(own, sequence_group=ThreadGroup(rank, board, barrier), slice_tokens=slice_tokens)
        try:
            return work(own)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
