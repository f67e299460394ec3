"""MLflow runs: a parent for all stages of a training, a child for each stage, one for each submission; models.

Only launchers and flows write to MLflow, never the ranks of a training, so that a database file has writers on one
host. Its first use creates the tables; a lock keeps two processes from doing that at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from magicdrive_core.config.cluster_section import SECRETS
from magicdrive_core.config.schema import Config, Tracking
from magicdrive_core.errors import HIDDEN, MagicDriveError, redact
from magicdrive_core.tracking.lineage import RUN_NOTE, lineage_tags, read_run_note
from magicdrive_core.utils.files import write_json

logger = logging.getLogger(__name__)
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # its migrations report every table

PARENT = "mlflow.parentRunId"
PREVIEWS = "previews"  # folder of a run's artifacts
LOCK_SECONDS = 120
PATIENCE_SECONDS = 20.0  # for a server that does not answer, where MLflow itself would wait for a quarter of an hour
MOST = 1000  # metrics in one call to MLflow
LONGEST = 6000  # characters of a param's value
STEADY = 8  # losses: the mean of fewer says more about the noise levels that were drawn than about the network
SHA256 = "weights_sha256"  # tag of runs and of versions of models

Status = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")

# MLflow's own limits are 120 s and 7 tries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@dataclass(frozen=True)
class Entry:
    """Metrics of one moment.

    Attributes:
        step: Training step that they belong to.
        time: Seconds since 1970. Equal entries are one entry in the database, so it is that of the step.
        values: By name.
    """

    step: int
    time: float
    values: Mapping[str, float]


class Store:
    """The tracking database and its one experiment.

    Attributes:
        client: MLflow's client of the database.
        experiment: Id of the experiment.
    """

    def __init__(self, tracking: Tracking, project: Path = Path()) -> None:
        """Open the database; create database and experiment if they are missing.

        Args:
            tracking: Settings of MLflow.
            project: The project's folder; a relative SQLite path and ``tracking.artifacts`` are below it.

        Raises:
            MagicDriveError: Another process holds the lock for minutes, or the database cannot be used.
        """
        folder = project / tracking.artifacts
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder.parent / ".mlflow.lock", timeout=LOCK_SECONDS):
                self.client = MlflowClient(_absolute(tracking.uri, project))
                experiment = self.client.get_experiment_by_name(tracking.experiment)
                if experiment and experiment.lifecycle_stage == LifecycleStage.DELETED:
                    raise MagicDriveError(
                        f"the MLflow experiment {tracking.experiment!r} is deleted",
                        f"restore it (mlflow experiments restore -x {experiment.experiment_id}), or set another"
                        " tracking.experiment",
                    )
                self.experiment = (
                    experiment.experiment_id
                    if experiment
                    else self.client.create_experiment(tracking.experiment, folder.resolve().as_uri())
                )
        except Timeout:
            raise MagicDriveError(
                f"{folder.parent} has been locked for {LOCK_SECONDS} s",
                "another process is setting up MLflow: wait, then run again",
            ) from None
        except ModuleNotFoundError as error:
            raise MagicDriveError(
                f"the driver of the database of tracking.uri is not installed: {error.name}",
                f"pip install {error.name}, or set another tracking.uri",
            ) from None
        except (MlflowException, SQLAlchemyError) as error:
            raise MagicDriveError(
                f"MLflow cannot use {tracking.uri}: {' '.join(str(error).split())[:200]}",
                "move the database away, or set another tracking.uri",
            ) from error

    def open(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Start a run.

        Args:
            name: Name that MLflow shows.
            tags: Tags of the run.
            parent: Id of the parent run; None: the run has no parent.

        Returns:
            The id of the run.
        """
        family = {PARENT: parent} if parent else {}
        return self.client.create_run(self.experiment, tags={**tags, **family}, run_name=name).info.run_id

    def reopen(self, run: str, parent: str | None) -> bool:
        """Resume an interrupted run: set its status to running again.

        Args:
            run: Id of the run.
            parent: Id of the run that becomes its parent; None: the parent stays as it is.

        Returns:
            Whether the database has the run and it was not deleted; if not, nothing is changed.
        """
        try:
            known = self.client.get_run(run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # such as a server that is away
                raise
            return False
        if known.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return False
        self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
        if parent:
            self.client.set_tag(run, PARENT, parent)
        return True

    def params(self, run: str, values: Mapping[str, Any]) -> None:
        """Log settings as params of a run.

        Params cannot change. A setting that has another value when the run is resumed becomes a tag ``resumed.<key>``.

        Args:
            run: Id of the run.
            values: Settings, nested as in params.yaml; they are logged flat (see ``flatten``).
        """
        known = self.client.get_run(run).data.params
        flat = flatten(values)
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        changed = [RunTag(f"resumed.{key}", v) for key, v in flat.items() if key in known and known[key] != v]
        self.client.log_batch(run, params=new, tags=changed)

    def log_entries(self, run: str, entries: Sequence[Entry]) -> None:
        """Log metrics of some steps in one call: the database has all of them then, or none.

        Args:
            run: Id of the run.
            entries: At most ``MOST`` values in all; those that are there already, time included, are not doubled.
        """
        metrics = [
            Metric(name, value, round(entry.time * 1000), entry.step)
            for entry in entries
            for name, value in entry.values.items()
        ]
        self.client.log_batch(run, metrics=metrics)

    def steps_of(self, run: str, metric: str) -> set[int]:
        """Return the steps for which a run has a metric.

        Args:
            run: Id of the run.
            metric: Its name.
        """
        return {each.step for each in self.client.get_metric_history(run, metric)}

    def log_preview(self, run: str, picture: Path) -> None:
        """Copy a picture into a run's ``previews``.

        Args:
            run: Id of the run.
            picture: The image file.
        """
        self.client.log_artifact(run, str(picture), PREVIEWS)

    def previews_of(self, run: str) -> set[str]:
        """Return the names of the pictures in a run's ``previews``.

        Args:
            run: Id of the run.
        """
        return {Path(file.path).name for file in self.client.list_artifacts(run, PREVIEWS)}

    def close(self, run: str, status: Status, **tags: str) -> None:
        """End a run.

        Args:
            run: Id of the run.
            status: Status that it ends with.
            **tags: Further tags of the run.
        """
        for key, value in tags.items():
            self.client.set_tag(run, key, value)
        self.client.set_terminated(run, status)

    def register(self, model: str, alias: str, weights: Path, digest: str, run: str) -> str:
        """Register weights as a new version of a model and move an alias to it; once for each run.

        The file stays in its folder; the registry keeps its path and its SHA-256.

        Args:
            model: Name of the registered model.
            alias: Alias that will name the new version.
            weights: The safetensors file.
            digest: SHA-256 of the file.
            run: Id of the run that trained it.

        Returns:
            The number of the version, as text: the one that the run has already, if its weights are the same.
        """
        try:
            self.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for known in self.client.search_model_versions(f"run_id = '{run}'"):
            if known.name == model and known.tags.get(SHA256) == digest:
                return str(known.version)
        uri, tags = weights.resolve().as_uri(), {SHA256: digest}
        version = self.client.create_model_version(model, uri, run, tags=tags).version
        self.client.set_registered_model_alias(model, alias, version)
        return str(version)


def open_parent(config: Config, name: str, project: Path = Path()) -> str:
    """Start a parent run with the whole configuration as params and its lineage as tags.

    Args:
        config: All settings.
        name: Name that MLflow shows.
        project: The project's folder.

    Returns:
        The id of the run.

    Raises:
        MagicDriveError: MLflow's database cannot be used, or ``dvc.lock`` is not YAML.
    """
    store = Store(config.tracking, project)
    run = store.open(name, lineage_tags(config, project))
    store.params(run, config.model_dump(mode="json"))
    return run


def close_parent(config: Config, run: str, status: Status, project: Path = Path()) -> None:
    """End a parent run.

    Args:
        config: All settings; those of MLflow are used.
        run: Id of the run.
        status: Status that it ends with.
        project: The project's folder.

    Raises:
        MagicDriveError: MLflow's database cannot be used.
    """
    Store(config.tracking, project).close(run, status)


def log_results(config: Config, run: str, metrics: Mapping[str, float], picture: Path, project: Path = Path()) -> None:
    """Add final metrics and a picture to a run, which may have ended.

    Args:
        config: All settings; those of MLflow are used.
        run: Id of the run.
        metrics: Values by name, logged at step 0; those that are not finite are left out.
        picture: Image file that is copied into the run's ``previews``.
        project: The project's folder.

    Raises:
        MagicDriveError: MLflow's database cannot be used.
    """
    store = Store(config.tracking, project)
    values = {name: value for name, value in metrics.items() if math.isfinite(value)}
    store.log_entries(run, [Entry(0, time.time(), values)])
    store.log_preview(run, picture)


def log_submission(
    config: Config,
    folder: Path,
    figures: Mapping[str, float],
    files: Sequence[Path],
    tags: Mapping[str, str],
    project: Path = Path(),
) -> str:
    """Log a submission's figures and files; a second call for the same folder updates the same run.

    Args:
        config: Logged as params.
        folder: The submission's folder; ``mlflow.json`` in it keeps the run's id.
        figures: Logged as metrics.
        files: Copied into the run's artifacts; missing files are left out.
        tags: Lineage: what the submission was made from.
        project: The project's folder.

    Returns:
        The run's id.

    Raises:
        MagicDriveError: MLflow's database cannot be used.
    """
    store = Store(config.tracking, project)
    run = read_run_note(folder).get("run", "")
    if not run or not store.reopen(run, None):
        run = store.open("submission", {})
        write_json(folder / RUN_NOTE, {"run": run})
    for name, text in tags.items():
        store.client.set_tag(run, name, text)
    store.params(run, config.model_dump(mode="json"))
    for name, value in figures.items():
        store.client.log_metric(run, name, value)
    for file in files:
        if file.is_file():
            store.client.log_artifact(run, str(file))
    store.close(run, "FINISHED")
    return run


def first_and_last(losses: Sequence[float]) -> tuple[float, float]:
    """Summarise a training run's losses by their means at its start and at its end.

    Args:
        losses: One for each logged step, in order; at least one.

    Returns:
        Means of the first and of the last tenth; of at least eight losses, or of half of all where there are fewer.
    """
    count = max(len(losses) // 10, min(STEADY, len(losses) // 2), 1)
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to text by dotted key: ``{"a": {"b": 1}}`` becomes ``{"a.b": "1"}``.

    Args:
        values: Mappings of any depth; values that are not text become JSON.
        prefix: Text before every key, with its dot.

    Returns:
        Text by key, each cut to ``LONGEST`` characters. Secrets are hidden: passwords of addresses, the settings of
        ``SECRETS``.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            name, text = f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
            flat[name] = HIDDEN if value and name.startswith(SECRETS) else redact(text)[:LONGEST]
    return flat


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 200 characters, without passwords of addresses.

    Args:
        error: Of MLflow, a driver or an artifact store, whose messages may be pages long.
    """
    return redact(" ".join(str(error).split()))[:200] or type(error).__name__


def best_effort(what: str, work: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T | None:
    """Do something with MLflow that must neither fail nor delay the work that it describes.

    Args:
        what: What is not done in the case of a failure, for the warning.
        work: Runs in a thread of its own.
        seconds: Longest wait.

    Returns:
        The result; None, with a warning, where MLflow refused or did not answer in time.
    """
    results: list[T] = []
    faults = ["it does not answer"]

    def attempt() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - drivers and artifact stores raise anything
            faults.append(one_line(error))

    thread = threading.Thread(target=attempt, name="mlflow", daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    logger.warning("MLflow: %s: %s", what, faults[-1])
    return None


def _absolute(uri: str, project: Path) -> str:
    """Resolve a relative SQLite path from the project's folder instead of the working directory."""
    scheme = "sqlite:///"
    path = Path(uri.removeprefix(scheme))
    if not uri.startswith(scheme) or path.is_absolute():
        return uri
    (project / path).parent.mkdir(parents=True, exist_ok=True)
    return f"{scheme}{(project / path).resolve()}"
