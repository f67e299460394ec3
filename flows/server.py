"""Starts and stops a Prefect server, the deployments and a worker on this machine, without a cluster.

    python -m flows.server up --port 4200
    python -m flows.server down

The server listens on 127.0.0.1. ``.prefect/`` holds the database, logs, process ids, and a profile that points the
``prefect`` commands typed in this folder at the server. On a cluster the server runs elsewhere: set PREFECT_API_URL,
then run ``prefect deploy --all`` here and ``prefect worker start --pool magicdrive`` on each training host.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from flows.common import main, tool
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_file, read_json, write_json

HOME = Path(".prefect")
PROFILE = HOME / "profiles.toml"
PROCESSES = HOME / "processes.json"  # name -> process id and start time, so that no other process is ever signalled
POOL = "magicdrive"
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
    api = f"http://127.0.0.1:{port}/api"
    server = _start("server", ["server", "start", "--host", "127.0.0.1", "--port", str(port)], {})
    try:
        _wait_for(api, server)
        with atomic_file(PROFILE) as partial:
            partial.write_text(f'active = "local"\n\n[profiles.local]\nPREFECT_API_URL = "{api}"\n', encoding="utf-8")
        _prefect(["work-pool", "create", POOL, "--type", "process", "--overwrite"])
        # A training uses every device of its host, so flow runs wait for each other.
        _prefect(["work-pool", "set-concurrency-limit", POOL, "1"])
        _prefect(["--no-prompt", "deploy", "--all"])
        _crash_lost_runs(api)
        _start("worker", ["worker", "start", "--pool", POOL, "--type", "process"], {"PREFECT_API_URL": api})
    except BaseException:
        down()
        raise
    print(f"Prefect: http://127.0.0.1:{port}   logs: {HOME}/server.log, {HOME}/worker.log")
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


def _start(name: str, arguments: list[str], environment: dict[str, str]) -> psutil.Popen:
    """Starts a ``prefect`` command that outlives this process, and notes its id."""
    HOME.mkdir(exist_ok=True)
    environment = os.environ | {"PREFECT_HOME": str(HOME.absolute())} | environment
    with (HOME / f"{name}.log").open("ab") as log:
        process = psutil.Popen(
            [tool("prefect"), *arguments],
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


def _crash_lost_runs(api: str) -> None:
    """Marks flow runs as crashed whose process ended unnoticed: each would block the pool's only slot for ever.

    No worker of this pool runs yet, so nothing that the server calls running is running.
    """
    states = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
    wanted = {"flow_runs": {"state": states}, "work_pools": {"name": {"any_": [POOL]}}}
    for run in _post(f"{api}/flow_runs/filter", wanted):
        state = {"type": "CRASHED", "message": "its worker stopped without reporting it"}
        _post(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def _prefect(arguments: list[str]) -> None:
    done = subprocess.run([tool("prefect"), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()[-40:])
        raise MagicDriveError(f"`prefect {' '.join(arguments)}` failed: {reason}", f"see {HOME}/server.log")


if __name__ == "__main__":
    main(app)
