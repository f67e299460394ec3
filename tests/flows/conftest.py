"""One server, as `make up` starts it, for all tests of flows and a worker, and a migrated MLflow database."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import server
from flows.common import new_password
from tests.tracking.conftest import migrated, project

__all__ = ["migrated", "prefect_api", "project", "served"]


@dataclass(frozen=True)
class Served:
    """A running server: its address, its password, its folder."""

    address: str
    password: str
    home: Path

    @property
    def api(self) -> str:
        return f"{self.address}/api"

    @property
    def login(self) -> tuple[str, str]:
        user, password = self.password.split(":")
        return user, password

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.api, auth_string=self.password)

    def flows(self) -> list[str]:
        answer = httpx.post(f"{self.api}/flows/filter", json={}, auth=self.login, timeout=60)
        return [flow["name"] for flow in answer.raise_for_status().json()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a database of its own, in a folder of its own."""
    port, password = free_port(), new_password()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("served"))
        for name in ("PREFECT_API_BLOCKS_REGISTER_ON_START", "PREFECT_SERVER_UI_ENABLED"):
            patch.setenv(name, "false")  # half of the start
        process = server.start_server(port, password)
        home = server.HOME.absolute()
    try:
        served = Served(f"http://127.0.0.1:{port}", password, home)
        server._wait_for(served.api, process)
        with served.client() as client:
            server.prepare_pool(client)
        yield served
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def prefect_api(served: Served) -> Iterator[str]:
    """Address of the server; settings and environment hold its password, here and in children."""
    settings = {PREFECT_API_URL: served.api, PREFECT_API_AUTH_STRING: served.password}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(settings):
        patch.setenv("PREFECT_API_AUTH_STRING", served.password)
        yield served.api
