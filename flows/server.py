"""Starts and stops a Prefect server, the deployments and a worker on this machine, without a cluster.

    python -m flows.server up --port 4200
    python -m flows.server down

The server listens on 127.0.0.1, asks for a password, and refuses pages of other origins (``flows/guard.py``): whoever
may use its API can start processes. ``.prefect/``, which only its owner can read, holds the database, logs, process
ids, and a profile that gives address and password to the ``prefect`` commands typed in this folder. On a cluster the
server runs elsewhere: docs/how-to/prefect.md.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import State, StateType
from prefect.states import Crashed

from flows.common import exit_codes, new_password, tool
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_file, private_folder, read_json, write_json

HOME = Path(".prefect")
PROFILE = HOME / "profiles.toml"
PROCESSES = HOME / "processes.json"  # name -> process id and start time, so that no other process is ever signalled
POOL = "magicdrive"
TEMPLATE = Path(__file__).with_name("pool.json")  # of the jobs that the pool's workers start
RUN_SECONDS = 40.0  # for a flow run to stop: more than it allows its children (common.STOP) and ranks
END_SECONDS = 15.0  # for a worker without flow runs, or a server, to stop: each needs two to four
START_SECONDS = 180.0  # the first start creates the database

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def up(port: Annotated[int, typer.Option(min=1, max=65535)] = 4200) -> None:
    """Start server and worker, and register the deployments of prefect.yaml."""
    if _alive():
        raise MagicDriveError("the Prefect server is already running", "`make down` stops it")
    _check_port(port)
    address = f"http://127.0.0.1:{port}"
    api, password = f"{address}/api", new_password()
    server = start_server(port, password)
    try:
        _wait_for(api, server)
        with atomic_file(PROFILE, private=True) as partial:
            partial.write_text(_profile(api, password), encoding="utf-8")
        access = {"PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": password}  # over those of this process
        with SyncPrefectClient(api, auth_string=password) as client:
            prepare_pool(client)
            _deploy(access)
            _crash_lost_runs(client)
        _start("worker", [tool("prefect"), "worker", "start", "--pool", POOL, "--type", "process"], access)
    except BaseException:
        down()
        raise
    print(f"Prefect: {address}   logs: {HOME}/server.log, {HOME}/worker.log")
    print(f"Login:   the pages ask once for the PREFECT_API_AUTH_STRING of {PROFILE}")
    print("Try:     prefect deployment run train/stage3-train   (source .venv/bin/activate first)")
    print("Stop:    make down")


@app.command()
def down() -> None:
    """Stop server and worker; their records are kept."""
    processes = _alive()
    for name in ("worker", "server"):  # a worker whose server is gone retries and complains before it stops
        if name in processes:
            _end(processes[name])
    PROCESSES.unlink(missing_ok=True)
    PROFILE.unlink(missing_ok=True)
    print(f"stopped: {', '.join(processes) or 'nothing was running'}")


def _end(process: psutil.Process) -> None:
    """Stops the children of a process, then the process: a worker that stops first would kill its flow runs."""
    family = process.children(recursive=True)
    _stop(process.children(), RUN_SECONDS)
    _stop([process], END_SECONDS)
    _stop(family, 0.0)  # left by a flow run that had to be killed


def _stop(processes: list[psutil.Process], seconds: float) -> None:
    """Sends SIGTERM, waits so many seconds for checkpoints and records, then sends SIGKILL."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, surviving = psutil.wait_procs(processes, timeout=seconds)
    for process in surviving:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(surviving)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MagicDriveError(f"port {port} cannot be used: {error.strerror}", "make up PORT=4210") from None


def start_server(port: int, password: str) -> psutil.Popen:
    """Starts the server behind its check of Host and Origin.

    Args:
        port: free port of 127.0.0.1.
        password: what every request to the API must bring, as ``user:password``.

    Returns:
        The process, which outlives this one and may still be starting.
    """
    command = [sys.executable, "-m", "uvicorn", "--factory", "flows.guard:create_app"]
    settings = {
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "PREFECT_UI_API_URL": "/api",  # the pages' own origin, by whichever name they were opened
    }
    return _start("server", [*command, "--host", "127.0.0.1", "--port", str(port)], settings)


def prepare_pool(client: SyncPrefectClient) -> None:
    """Creates the work pool, or gives it the settings that it has to have.

    Its template has no variable that decides what a worker executes (command, environment, folder).

    Args:
        client: of the server.
    """
    # A training uses every device of its host, so flow runs wait for each other.
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=read_json(TEMPLATE), concurrency_limit=1)
    client.create_work_pool(pool, overwrite=True)


def _profile(api: str, password: str) -> str:
    """Text of the profile that ``prefect`` commands in this folder use."""
    lines = ['active = "local"', "", "[profiles.local]"]
    values = {"PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": password}
    return "\n".join([*lines, *(f'{name} = "{value}"' for name, value in values.items()), ""])


def _start(name: str, command: Sequence[str], environment: dict[str, str]) -> psutil.Popen:
    """Starts a command that outlives this process, and notes its id."""
    private_folder(HOME)
    environment = os.environ | {"PREFECT_HOME": str(HOME.absolute())} | environment
    with (HOME / f"{name}.log").open("ab") as log:
        process = psutil.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    known = read_json(PROCESSES) if PROCESSES.exists() else {}
    write_json(PROCESSES, known | {name: [process.pid, process.create_time()]})
    return process


def _alive() -> dict[str, psutil.Process]:
    """Returns the processes of an earlier ``up`` that still run."""
    found = {}
    for name, (pid, born) in (read_json(PROCESSES) if PROCESSES.exists() else {}).items():
        try:
            process = psutil.Process(pid)
            if process.create_time() == born:
                found[name] = process
        except psutil.NoSuchProcess:
            continue
    return found


def _wait_for(api: str, server: psutil.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
                if json.load(answer):
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise MagicDriveError("the Prefect server did not start", f"see {HOME}/server.log")


def _deploy(access: dict[str, str]) -> None:
    """Registers the deployments of prefect.yaml."""
    command = ["prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        [tool(command[0]), *command[1:]],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | access,
    )
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()[-40:])
        raise MagicDriveError(f"`{' '.join(command)}` failed: {reason}", f"see {HOME}/server.log")


def _crash_lost_runs(client: SyncPrefectClient) -> None:
    """Marks flow runs as crashed whose process ended unnoticed: each would block the pool's only slot for ever.

    No worker of this pool runs yet, so nothing that the server calls running is running.
    """
    states = {"type": {"any_": [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]}}
    lost = FlowRunFilter.model_validate({"state": states})
    pool = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    for run in client.read_flow_runs(flow_run_filter=lost, work_pool_filter=pool):
        state: State[None] = Crashed(message="its worker stopped without reporting it")
        client.set_flow_run_state(run.id, state, force=True)


if __name__ == "__main__":
    with exit_codes():
        app()
