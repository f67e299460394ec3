"""Shards on Prefect's task runners, also in other processes; a message for a runner that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from prefect import flow

from flows import generate
from magicdrive_core.errors import UsageError


def test_a_runner_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(UsageError, match=r"generate\.task_runner ray: prefect_ray is not installed") as raised:
        generate._task_runner("ray", None)
    assert raised.value.hint == "pip install 'magicdrive[ray]'"


def test_a_scheduler_is_handed_to_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("prefect_dask")
    module.DaskTaskRunner = lambda **settings: settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefect_dask", module)
    assert generate._task_runner("dask", "tcp://scheduler:8786") == {"address": "tcp://scheduler:8786"}
    assert generate._task_runner("dask", None) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_shards_run_in_the_processes_of_a_dask_cluster(tmp_path: Path) -> None:
    """A shard carries all that it needs to another process. Its verb only prints its help."""
    fan_out = flow(task_runner=generate._task_runner("dask", None), validate_parameters=False)(generate._fan_out)
    fan_out(2, ["--help"], tmp_path)
    for number in (1, 2):
        assert "--shard" in (tmp_path / f"shard-{number}.log").read_text()
