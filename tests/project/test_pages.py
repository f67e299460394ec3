"""`make ui`: MLflow's pages answer this machine's own address alone."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import PROJECT
from tests.flows.conftest import free_port
from tests.tracking.conftest import migrated, project

__all__ = ["migrated", "project"]


@pytest.mark.slow
def test_mlflows_pages_refuse_foreign_names_and_origins(project: Path) -> None:
    recipe = re.search(r"^ui:.*\n((\t.*\n)+)", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    words, port = shlex.split(recipe[1].replace("\\\n", " ")), free_port()
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:], "--port", str(port), "--workers", "1"]
    with (
        (project / "log").open("wb") as log,
        subprocess.Popen(command, cwd=project, stdout=log, stderr=log) as pages,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", pages)
            create = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/create"
            for number, (headers, status) in enumerate(
                [
                    ({}, 200),
                    ({"Host": f"localhost:{port}"}, 200),
                    ({"Host": f"site.test:{port}"}, 403),
                    ({"Host": "192.168.0.1"}, 403),
                    ({"Origin": "http://site.test"}, 403),
                    ({"Origin": "null"}, 403),
                ]
            ):
                answer = httpx.post(create, json={"name": str(number)}, headers=headers, timeout=60)
                assert answer.status_code == status, (headers, answer.text)
        finally:
            pages.terminate()


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(address, timeout=5).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{address} does not answer")
