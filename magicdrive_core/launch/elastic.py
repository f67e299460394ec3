"""The agent that starts the ranks of one host with torch's elastic API and reports which of them failed.

    python -m magicdrive_core.launch.elastic --ranks 2 -- -m magicdrive_core.training.worker runs/stage1-0123456789ab

``process_group.run_group`` starts it and supervises it; it exits with 0 when all ranks did, else with 1.

The agent ignores SIGTERM, SIGINT and SIGUSR2. A scheduler sends them to every process of a host, and torch's agent
would answer by killing the ranks after 30 s, whatever they still have to save; the launcher ends the group instead.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from magicdrive_core.launch.process_group import LOOPBACK, RankFailure
from magicdrive_core.utils.files import write_json

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def launch(options: argparse.Namespace) -> list[RankFailure]:
    """Run the command on this host's ranks until all of them end.

    Args:
        options: the command line as ``main`` parses it: ``ranks``, ``hosts``, ``host``, ``address``, ``port`` and
            ``command``.

    Returns:
        The ranks that failed, the earliest first; empty if all exited with 0.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous_handler_registry.register("loopback", _loopback_rendezvous)
    with tempfile.TemporaryDirectory(prefix="magicdrive-ranks-") as folder:  # of the ranks' error files
        config = LaunchConfig(
            min_nodes=options.hosts,
            max_nodes=options.hosts,
            nproc_per_node=options.ranks,
            run_id="magicdrive",
            rdzv_backend="loopback" if options.hosts == 1 else "static",
            rdzv_endpoint=f"{options.address}:{options.port}",
            rdzv_configs={"rank": options.host},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGHUP",
        )
        try:
            elastic_launch(config, sys.executable)("-u", *options.command)
        except ChildFailedError as error:
            earliest_first = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
            return [_failure(rank, process) for rank, process in earliest_first]
    return []


def _failure(rank: int, process: ProcessFailure) -> RankFailure:
    """Take what the report needs from torch's record of a failed process."""
    message = process.error_file_data["message"]  # what ``record`` wrote, or the placeholder "<NONE>"
    reason = message["message"].splitlines()[0] if isinstance(message, dict) else ""
    return RankFailure(rank, process.exitcode, reason)


def _loopback_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    """Return the rendezvous of a group on one host: one store for agent and ranks, bound to 127.0.0.1.

    torch binds the stores of its own rendezvous to all addresses of the host.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class LoopbackRendezvous(StaticTCPRendezvous):
        def __init__(self) -> None:
            listener = socket.create_server((LOOPBACK, 0))  # a free port
            port = listener.getsockname()[1]
            super().__init__(LOOPBACK, port, 0, 1, parameters.run_id, parameters.config["timeout"])
            self._store = TCPStore(
                LOOPBACK,
                port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listener.detach(),  # the store closes it
            )

        def get_backend(self) -> str:
            return parameters.backend

    return LoopbackRendezvous()


def main() -> None:
    """Parse the command line, run the ranks, and write the failures where the launcher looks for them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by the ranks
    parser = argparse.ArgumentParser(prog="python -m magicdrive_core.launch.elastic", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True, help="processes on this host")
    parser.add_argument("--hosts", type=int, default=1, help="hosts that run the same number of ranks each")
    parser.add_argument("--host", type=int, default=0, help="number of this host, from 0")
    parser.add_argument("--address", default=LOOPBACK, help="of host 0, where there are several")
    parser.add_argument("--port", type=int, default=0, help="free port of host 0, where there are several")
    parser.add_argument("--failures", type=Path, help="file for the failed ranks, as JSON")
    parser.add_argument("command", nargs="+", help="script and arguments, or -m module and arguments; after --")
    options = parser.parse_args()
    # The log ends with what the ranks wrote last, which explains a rank that left no exception. What the agent itself
    # would log of failures is in the file.
    logging.disable(logging.ERROR)
    failures = launch(options)
    if options.failures is not None:
        write_json(options.failures, [asdict(failure) for failure in failures])
    elif failures:
        print(*failures, sep="\n", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
