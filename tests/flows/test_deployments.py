"""prefect.yaml against the flows that it names."""

from __future__ import annotations

import importlib
import inspect

import yaml
from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE

from tests.conftest import PROJECT

DEPLOYMENTS = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
MODULES = [importlib.import_module(f"flows.{path.stem}") for path in (PROJECT / "flows").glob("[a-z]*.py")]


def test_deployments_name_flows_and_their_parameters() -> None:
    names = set()
    for deployment in DEPLOYMENTS:
        path, function = deployment["entrypoint"].split(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
        assert isinstance(flow, Flow)
        assert set(deployment.get("parameters", {})) <= set(inspect.signature(flow.fn).parameters)
        assert deployment["work_pool"] == {"name": "magicdrive"}
        names.add(f"{flow.name}/{deployment['name']}")
    assert names == {
        "prepare/data",
        "train/stage1-train",
        "train/stage2-train",
        "train/stage3-train",
        "generate/val",
        "benchmark/wcoda",
        "pipeline/demo",
    }


def test_prefect_caches_no_result() -> None:
    tasks = [value for module in MODULES for value in vars(module).values() if isinstance(value, Task)]
    assert len(tasks) >= 4
    for task in tasks:
        assert task.cache_policy == NO_CACHE
        assert not task.persist_result
    for flow in [value for module in MODULES for value in vars(module).values() if isinstance(value, Flow)]:
        assert not flow.persist_result
