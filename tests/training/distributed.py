"""Runs functions in groups of a few gloo ranks, which stay alive between tests: importing torch costs seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any


def join_training() -> None:
    """As a rank of a training does."""
    from magicdrive_core.training.strategy import join_group

    join_group()


def join_gloo() -> None:
    """Without ColossalAI, whose import takes each rank longer than most tests."""
    import torch.distributed as dist

    dist.init_process_group("gloo")


def run_distributed(
    function: Callable[..., Any], ranks: int, *arguments: Any, join: Callable[[], None] = join_training
) -> list[Any]:
    """Calls a module's function with ``arguments`` on every rank of a group; returns the results by rank.

    Raises:
        AssertionError: with the traceback of the first rank that failed. The group is replaced for the next call.
    """
    pipes = _group(ranks, join)
    for pipe in pipes:
        pipe.send((function, arguments))
    answers = [pipe.recv() for pipe in pipes]
    for rank, (fault, _) in enumerate(answers):
        if fault:
            _group.cache_clear()  # its collectives may be out of step
            raise AssertionError(f"rank {rank}:\n{fault}")
    return [value for _, value in answers]


@cache
def _group(ranks: int, join: Callable[[], None]) -> list[Connection]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, rank, ranks, port, join), daemon=True)
        process.start()
        atexit.register(process.terminate)
        pipes.append(ours)
    return pipes


def _serve(pipe: Connection, rank: int, ranks: int, port: int, join: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    join()
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((None, function(*arguments)))
        except Exception:  # noqa: BLE001
            pipe.send((traceback.format_exc(), None))
