"""MLflow runs: a parent for all stages of a training, a child for each stage, one for each submission; models.

The launcher opens and closes runs; only rank 0 logs metrics (``MetricLog``). MLflow's database is a file, and its first
use creates the tables. A lock keeps two processes from doing that at once.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from magicdrive_core.config.schema import Config, Tracking
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.tracking.lineage import lineage_tags
from magicdrive_core.utils.files import read_json, write_json

logger = logging.getLogger(__name__)
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # its migrations report every table

PARENT = "mlflow.parentRunId"
LOCK_SECONDS = 120
FLUSH_SECONDS = 10.0  # a write to the database costs tens of milliseconds
MOST = 1000  # metrics in one call to MLflow
LONGEST = 6000  # characters of a param's value
STEADY = 8  # losses: the mean of fewer says more about the noise levels that were drawn than about the network
SUBMISSION_RUN = "mlflow.json"  # file in a submission's folder that names its run
SHA256 = "weights_sha256"  # tag of runs and of versions of models

Status = Literal["FINISHED", "FAILED", "KILLED"]


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
            Whether the database has the run; if not, nothing is changed.
        """
        try:
            self.client.update_run(run, status=RunStatus.to_string(RunStatus.RUNNING))
        except MlflowException:
            return False
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
        """Register weights as a new version of a model and move an alias to it.

        The file stays in its folder; the registry keeps its path and its SHA-256.

        Args:
            model: Name of the registered model.
            alias: Alias that will name the new version.
            weights: The safetensors file.
            digest: SHA-256 of the file.
            run: Id of the run that trained it.

        Returns:
            The number of the version, as text.
        """
        try:
            self.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
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
    log = MetricLog(Store(config.tracking, project), run)
    log.metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step=0)
    log.picture(picture)
    log.flush()


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
    store, note = Store(config.tracking, project), folder / SUBMISSION_RUN
    run = str(read_json(note)["run"]) if note.is_file() else ""
    if not run or not store.reopen(run, None):
        run = store.open("submission", {})
        write_json(note, {"run": run})
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
        Text by key, each cut to ``LONGEST`` characters.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (value if isinstance(value, str) else json.dumps(value))[:LONGEST]
    return flat


class MetricLog:
    """Logs metrics and pictures of one run from the rank that logs, in batches.

    Metrics are best effort: logging never ends a training run.
    """

    def __init__(self, store: Store, run: str) -> None:
        """Log to a run that exists; nothing is written before the first flush.

        Args:
            store: The tracking database.
            run: Id of the run.
        """
        self._store, self._run = store, run
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue metrics; they are written every few seconds.

        Args:
            values: Values by name.
            step: Step of all these values.
        """
        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def picture(self, path: Path) -> None:
        """Copy a picture into the run's ``previews`` at once.

        Args:
            path: The image file.
        """
        self._store.client.log_artifact(self._run, str(path), "previews")

    def flush(self) -> None:
        """Write the queued metrics; on an error they stay queued."""
        self._flushed = time.monotonic()
        try:
            while self._waiting:
                self._store.client.log_batch(self._run, metrics=self._waiting[:MOST])
                del self._waiting[:MOST]
        except MlflowException as error:  # metrics are best effort
            logger.warning("MLflow is not reachable, metrics stay queued: %s", " ".join(str(error).split())[:200])


def _absolute(uri: str, project: Path) -> str:
    """Resolve a relative SQLite path from the project's folder instead of the working directory."""
    scheme = "sqlite:///"
    path = Path(uri.removeprefix(scheme))
    if not uri.startswith(scheme) or path.is_absolute():
        return uri
    (project / path).parent.mkdir(parents=True, exist_ok=True)
    return f"{scheme}{(project / path).resolve()}"
