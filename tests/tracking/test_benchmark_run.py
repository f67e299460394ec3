"""A benchmark is one run of MLflow, however often its report is written."""

from __future__ import annotations

from pathlib import Path

from magicdrive_core.config.load import load_config
from magicdrive_core.tracking.benchmark_run import record_benchmark
from magicdrive_core.tracking.runs import Store

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"


def test_a_second_report_goes_into_the_same_run(project: Path) -> None:
    config, folder = load_config(PROFILE), project / "outputs/benchmark-0"
    folder.mkdir(parents=True)
    page = folder / "report.html"
    page.write_text("first")
    run = record_benchmark(config, folder, {"small_224": 0.5}, [page, folder / "none.json"], {"model": "a"}, project)
    page.write_text("second")
    assert record_benchmark(config, folder, {"small_224": 0.25}, [page], {"model": "b"}, project) == run
    store = Store(config.tracking, project)
    found = store.client.get_run(run)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"small_224": 0.25})
    assert found.data.params["submission.team"] == "demo"
    assert found.data.tags["model"] == "b"
    assert [file.path for file in store.client.list_artifacts(run)] == ["report.html"]
    copy = store.client.download_artifacts(run, "report.html", str(project))
    assert Path(copy).read_text() == "second"
