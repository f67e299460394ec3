"""The MLflow run of a benchmark: its figures, and the files that a reader wants first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from magicdrive_core.config.schema import Config
from magicdrive_core.tracking.runs import Store
from magicdrive_core.utils.files import read_json, write_json

RUN = "mlflow.json"  # in the benchmark's folder: which run it is


def record_benchmark(
    config: Config,
    folder: Path,
    figures: Mapping[str, float],
    files: Sequence[Path],
    lineage: Mapping[str, str],
    project: Path = Path(),
) -> str:
    """Logs a benchmark, always as the same run while the folder is there; returns the run's id.

    Args:
        config: logged as params.
        folder: of the benchmark.
        figures: logged as metrics.
        files: copied into the run; those that are missing are left out.
        lineage: tags that say where it came from.
        project: the project's folder.

    Raises:
        MagicDriveError: MLflow's database cannot be used.
    """
    store, note = Store(config.tracking, project), folder / RUN
    run = str(read_json(note)["run"]) if note.is_file() else ""
    if not run or not store.reopen(run, None):
        run = store.open("benchmark", {})
        write_json(note, {"run": run})
    for name, text in lineage.items():
        store.client.set_tag(run, name, text)
    store.params(run, config.model_dump(mode="json"))
    for name, value in figures.items():
        store.client.log_metric(run, name, value)
    for file in files:
        if file.is_file():
            store.client.log_artifact(run, str(file))
    store.close(run, "FINISHED")
    return run
