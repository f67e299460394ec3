"""Who may use the server of `make up`: real requests, web sockets, and a page of another origin in a real browser."""

from __future__ import annotations

import http.server
import json
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.exceptions import PrefectHTTPStatusError
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from flows import server
from flows.guard import LocalOnly
from tests.flows.conftest import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize(
    ("login", "headers", "status"),
    [
        (True, {}, 200),
        (True, {"Origin": "{address}"}, 200),  # the server's own pages
        (False, {}, 401),
        (False, {"Origin": "{address}"}, 401),
        (True, {"Origin": "http://site.test"}, 403),
        (True, {"Origin": "http://127.0.0.1:1"}, 403),  # another server on this machine
        (True, {"Origin": "null"}, 403),  # a page without an origin: a file, a sandboxed frame
        (True, {"Host": "site.test"}, 403),  # a name that its owner made point to 127.0.0.1
        (True, {"Host": "127.0.0.1.site.test:80", "Origin": "http://127.0.0.1.site.test:80"}, 403),
    ],
)
def test_requests_need_the_password_and_come_from_this_machines_own_address(
    served: Served, login: bool, headers: dict[str, str], status: int
) -> None:
    headers = {name: value.format(address=served.address) for name, value in headers.items()}
    auth = served.login if login else None
    answer = httpx.post(f"{served.api}/flows/filter", json={}, auth=auth, headers=headers, timeout=60)
    assert answer.status_code == status
    if headers.get("Origin", served.address) != served.address:
        assert "access-control-allow-origin" not in answer.headers


def test_a_web_socket_of_a_foreign_page_is_closed_before_it_opens(served: Served) -> None:
    address = served.api.replace("http", "ws") + "/events/out"
    with pytest.raises(InvalidStatus, match="403"), connect(address, origin="http://site.test"):  # type: ignore[arg-type]
        pass
    with connect(address, subprotocols=["prefect"]) as own:  # type: ignore[list-item]
        own.send(json.dumps({"type": "auth", "token": served.password}))
        assert json.loads(own.recv(timeout=30))["type"] == "auth_success"


@pytest.mark.parametrize("variables", [{"command": "id"}, {"env": {"LD_PRELOAD": "x"}}, {"working_dir": "/tmp"}])
def test_no_variable_of_a_job_decides_what_a_worker_executes(served: Served, variables: dict[str, Any]) -> None:
    with served.client() as client:
        flow_id = client.create_flow_from_name("own")
        deployment = client.create_deployment(flow_id, "own", work_pool_name=server.POOL)
        client.create_flow_run_from_deployment(deployment, job_variables={"stream_output": False})
        with pytest.raises(PrefectHTTPStatusError, match="422"):
            client.create_flow_run_from_deployment(deployment, job_variables=variables)


def test_only_its_owner_enters_the_servers_folder(served: Served) -> None:
    assert stat.S_IMODE(served.home.stat().st_mode) == 0o700


# What a page can try: read, send a form's type of content (which asks nobody's permission first), send JSON (which asks
# with OPTIONS), open a web socket. It reports to its own server what it learned.
PAGE = """<script>
const api = "%s", body = JSON.stringify({name: "from-the-page"}), seen = {};
const note = (name, job) => job.then(value => { seen[name] = value }, () => { seen[name] = "refused" });
const text = async (url, options) => (await fetch(url, options)).text();
const socket = url => new Promise((resolve, reject) => {
    const opened = new WebSocket(url);
    opened.onopen = () => resolve("open");
    opened.onerror = reject;
});
Promise.all([
    note("read", text(api + "/api/health")),
    note("form", text(api + "/api/flows/", {method: "POST", mode: "no-cors", body})),
    note("json", text(api + "/api/flows/", {method: "POST", body, headers: {"Content-Type": "application/json"}})),
    note("socket", socket(api.replace("http", "ws") + "/api/events/out")),
]).then(() => fetch("/seen", {method: "POST", body: JSON.stringify(seen)}));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: the page of another origin is opened in a real browser")
def test_a_page_of_another_origin_in_a_browser_learns_and_changes_nothing(served: Served, tmp_path: Path) -> None:
    page, seen, arrived = PAGE % served.address, {}, threading.Event()

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self) -> None:
            seen.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            arrived.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += [f"--user-data-dir={tmp_path}", f"http://127.0.0.1:{site.server_port}/"]
        quiet = subprocess.DEVNULL
        browser = subprocess.Popen([str(CHROMIUM), *options], stdout=quiet, stderr=quiet)
        try:
            assert arrived.wait(120), "the page did not report"
        finally:
            browser.kill()
            browser.wait()
            site.shutdown()
    assert seen == {"read": "refused", "form": "", "json": "refused", "socket": "refused"}  # no-cors: an opaque answer
    assert "from-the-page" not in served.flows()


@given(host=st.text(st.characters(codec="ascii", exclude_categories=["Cc"])), origin=st.none() | st.just("http://{}"))
def test_no_other_name_than_this_machines_own_passes(host: str, origin: str | None) -> None:
    client = TestClient(LocalOnly(PlainTextResponse("in")))
    headers = {"Host": host} | ({"Origin": origin.format(host)} if origin else {})
    own = host.rsplit(":", 1)[0].strip() in ("127.0.0.1", "localhost")
    assert client.get("/", headers=headers).status_code == (200 if own else 403)
