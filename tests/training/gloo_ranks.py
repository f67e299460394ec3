"""Run functions in groups of a few gloo ranks, which stay alive between tests.

Importing torch and ColossalAI takes seconds of every rank. One process imports them once, and ranks are its forks: a
group starts in a moment, so that a test may also kill one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

PATIENCE = 20.0  # seconds for the other ranks once one has failed


def join_training() -> None:
    """Join the group as a rank of a training does."""
    from magicdrive_core.training.engine import join_group

    join_group(stall_seconds=1800)


def join_gloo() -> None:
    """Join the group without ColossalAI, whose import takes longer than most tests."""
    import torch.distributed as dist

    dist.init_process_group("gloo")


MODULES = {join_training: "magicdrive_core.training.loop", join_gloo: "torch.distributed"}


class RankError(AssertionError):
    """A rank failed or died; has the traceback of the first one."""


def run_distributed(
    function: Callable[..., Any], ranks: int, *arguments: Any, join: Callable[[], None] = join_training
) -> list[Any]:
    """Call a module's function with ``arguments`` on every rank of a group; return the results by rank.

    Raises:
        RankError: a rank failed or died. The group is replaced for the next call.
    """
    pipes, pids = _group(ranks, join)
    for pipe in pipes:
        pipe.send((function, arguments))
    answers: dict[int, Any] = {}
    fault, end = None, float("inf")
    while len(answers) < ranks and time.monotonic() < end:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        for ready in wait(list(waiting), timeout=0.2):
            rank = waiting[ready]  # type: ignore[index]
            try:
                failure, answers[rank] = pipes[rank].recv()
            except EOFError:
                failure, answers[rank] = "it died", None
            if failure and fault is None:
                fault, end = f"rank {rank}: {failure}", time.monotonic() + PATIENCE
    if fault is None:
        return [answers[rank] for rank in range(ranks)]
    _group.cache_clear()  # its collectives may be out of step
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    raise RankError(fault)


@cache
def _group(ranks: int, join: Callable[[], None]) -> tuple[list[Connection], list[int]]:
    """Start a group; return pipes to its ranks and their process ids."""
    with Listener(family="AF_UNIX", backlog=ranks) as door:
        _nursery().send((ranks, join, door.address))
        pipes = dict(_enter(door.accept()) for _ in range(ranks))
    return [pipes[rank][0] for rank in range(ranks)], [pipes[rank][1] for rank in range(ranks)]


def _enter(pipe: Connection) -> tuple[int, tuple[Connection, int]]:
    rank, pid = pipe.recv()
    return rank, (pipe, pid)


@cache
def _nursery() -> Connection:
    """Return a pipe to the process that forks."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_nurse, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    atexit.register(process.terminate)
    return ours


def _nurse(pipe: Connection) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            ranks, join, address = pipe.recv()
            import_module(MODULES[join])
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            for rank in range(ranks):
                if os.fork() == 0:
                    pipe.close()
                    _serve(rank, ranks, port, join, address)
                    os._exit(0)


def _serve(rank: int, ranks: int, port: int, join: Callable[[], None], address: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    pipe = Client(address)
    pipe.send((rank, os.getpid()))
    join()
    with suppress(EOFError):  # the tests are over
        while True:
            function, arguments = pipe.recv()
            try:
                pipe.send((None, function(*arguments)))
            except Exception:  # noqa: BLE001
                pipe.send((traceback.format_exc(), None))
