"""Brings the record of a training run to MLflow, in a thread beside the launcher that no training waits for.

The truth is in the run's folder: metrics.jsonl, previews/ and run.json. The server is asked what it has and gets the
rest, so nothing is missing in the end, however often the training, the launcher or the server ended in between. A
server that refuses or does not answer is tried again; what it still lacks at the end of a finished stage it gets when
the stage is asked for again.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from magicdrive_core.config.schema import Config
from magicdrive_core.errors import redact
from magicdrive_core.experiment.stages import StagePlan
from magicdrive_core.tracking.lineage import RUN_NOTE, lineage_tags, read_run_note
from magicdrive_core.tracking.runs import MOST, SHA256, Entry, Status, Store, one_line
from magicdrive_core.training.metrics_file import METRICS, Line, parse_lines
from magicdrive_core.utils.files import read_json, write_json

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 5.0  # between two looks at the folder
RETRY_SECONDS = 15.0  # after a server has refused
END_SECONDS = 30.0  # longest wait for a server at the end of a finished stage
CANCEL_SECONDS = 8.0  # and when the training was interrupted: its caller has little time
EVERY_STEP = "step_seconds"  # a metric that each entry has: its history tells which entries the server has

# Fields of a line, and their names in MLflow. Fields that hold values by name are in ``named_values``.
NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "loss_scale": "loss_scale",
    "seconds": EVERY_STEP,
    "clips_per_second": "clips_per_second",
    "tokens_per_second": "tokens_per_second",
    "tflops": "model_tflops",
    "model_flops_utilisation": "model_flops_utilisation",
    "loader_wait": "loader_wait_seconds",
}


def named_values(line: Line) -> Iterator[tuple[str, float]]:
    """Yield the figures of a step to log.

    Args:
        line: a line of metrics.jsonl.

    Yields:
        Name in MLflow and value; figures that the step does not have are left out. Memory is in GB (10^9 bytes).
    """
    for field, name in NAMES.items():
        if line.get(field) is not None:
            yield name, line[field]
    yield "skipped_steps", float(bool(line.get("skipped")))
    for group, field in (("loss", "bucket_losses"), ("loss_at_noise", "noise_losses")):
        for name, value in (line.get(field) or {}).items():
            yield f"{group}/{name}", value
    for group, field in (("device_memory", "memory"), ("host_memory", "host_memory")):
        for name, size in (line.get(field) or {}).items():
            yield f"{group}/{name}_gb", size / 1e9


def summarise(lines: Sequence[Line]) -> dict[str, float]:
    """Sum up the steps between two entries: not every step has every bucket and noise level.

    Args:
        lines: of metrics.jsonl, at least one.

    Returns:
        Means by their name in MLflow; of ``skipped_steps`` the number.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in named_values(line):
            values[name].append(value)
    return {name: fmean(those) for name, those in values.items()} | {"skipped_steps": sum(values["skipped_steps"])}


class GrowingHistory:
    """Reads metrics.jsonl while it grows, and sums up every ``log_every`` steps.

    Args:
        path: the file; it may be missing at first, and be replaced by a shorter one when a training resumes.
        log_every: steps of an entry; the last one may have fewer.
        steps: of the whole training.
    """

    def __init__(self, path: Path, log_every: int, steps: int) -> None:
        self._path, self._log_every, self._steps = path, log_every, steps
        self._inode, self._read = 0, 0
        self._open: dict[int, Line] = {}  # lines whose entry is not complete

    def entries(self) -> dict[int, Entry]:
        """Return the entries that have become complete since the last call, by step; all again after a replacement.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                if inode != self._inode or self._path.stat().st_size < self._read:
                    self._inode, self._read, self._open = inode, 0, {}
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return {}
        data = data[: data.rfind(b"\n") + 1]  # without a line that is being written
        lines, _ = parse_lines(data)
        self._read += len(data)
        self._open |= lines
        windows: dict[int, list[Line]] = defaultdict(list)
        for step, line in sorted(self._open.items()):
            windows[(step - 1) // self._log_every].append(line)
        complete: dict[int, Entry] = {}
        for number, window in windows.items():
            last = window[-1]["step"]
            if last % self._log_every == 0 or last == self._steps or number < max(windows):
                complete[last] = Entry(last, window[-1].get("time", 0.0), summarise(window))
                for line in window:
                    del self._open[line["step"]]
        return complete


class Delivery:
    """Delivers one training run. Its methods return at once, apart from ``end``, whose wait is bounded.

    Args:
        config: all settings.
        plan: the stage.
        parent: MLflow run of the whole training; None: there is none.
        project: the project's folder.
    """

    def __init__(self, config: Config, plan: StagePlan, parent: str | None, project: Path = Path()) -> None:
        self._config, self._plan, self._parent, self._project = config, plan, parent, project
        steps = config.training.stage(plan.stage).steps
        self._history = GrowingHistory(plan.folder / METRICS, config.training.log_every, steps)
        self._unsent: dict[int, Entry] = {}
        self._store: Store | None = None
        self._run = read_run_note(plan.folder).get("run")
        self._known: set[int] = set()  # steps that the server has
        self._known_previews: set[str] = set()
        self._status: Status | None = None  # that the run shall end with
        self._fault = "it does not answer"
        self._wake, self._done, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def run(self) -> str | None:
        """Id of the run in MLflow; None as long as no server has answered."""
        return self._run

    def start(self) -> None:
        """Start to deliver, now and whenever there is something new."""
        self._thread.start()

    def end(self, status: Status, seconds: float) -> None:
        """Deliver the rest, end the run, and register the weights of a finished stage.

        Args:
            status: that the run ends with.
            seconds: longest wait for the server; then the rest stays in the run's folder, with a warning.
        """
        self._status = status
        self._wake.set()
        if not self._done.wait(seconds):
            self._abandoned.set()
            self._wake.set()
            logger.warning(
                "MLflow (%s) has not got all of %s: %s; the rest stays in %s: run the same command again to send it",
                redact(self._config.tracking.uri),
                self._plan.stage,
                self._fault,
                self._plan.folder,
            )

    def _work(self) -> None:
        warned = False
        while not self._done.is_set() and not self._abandoned.is_set():
            pause = PERIOD_SECONDS
            try:
                self._deliver()
            except Exception as error:  # noqa: BLE001 - drivers and artifact stores raise anything; metrics are best effort
                self._fault = one_line(error)
                self._store, pause = None, RETRY_SECONDS
                if not warned:
                    logger.warning("MLflow gets metrics later: %s; training continues", self._fault)
                warned = True
            else:
                warned = False
            if not self._done.is_set():
                self._wake.wait(pause)
                self._wake.clear()

    def _deliver(self) -> None:
        """Send what is new, and end the run when it is time; any failure leaves the rest for the next call."""
        status = self._status  # before the folder is read: what comes later is for the next call
        if self._store is None:
            self._connect()
        store, run = self._store, self._run
        assert store is not None
        assert run is not None
        self._unsent |= self._history.entries()
        self._unsent = {step: entry for step, entry in self._unsent.items() if step not in self._known}
        for entries in _batches(list(self._unsent.values())):
            store.log_entries(run, entries)
            self._known |= {entry.step for entry in entries}
        self._send_previews(store, run)
        if status is None:
            return
        tags = {}
        if status == "FINISHED":
            facts = read_json(self._plan.result)
            digest = facts["weights_sha256"]
            model = f"magicdrive-{self._config.profile}"
            version = store.register(model, self._plan.stage, self._plan.weights, digest, run)
            tags = {"model_version": version, SHA256: digest}
        store.close(run, status, **tags)
        if status == "FINISHED":
            write_json(self._plan.folder / RUN_NOTE, {"run": run, "model_version": version})
        self._done.set()

    def _connect(self) -> None:
        """Open the database and the run, and ask what it has."""
        store = Store(self._config.tracking, self._project)
        config, plan = self._config, self._plan
        if self._run is None or not store.reopen(self._run, self._parent):
            tags = lineage_tags(config, self._project) | {"stage": plan.stage, "fingerprint": plan.fingerprint}
            if plan.previous is not None:
                tags["previous.run"] = read_run_note(plan.previous.folder).get("run", "none")
            if plan.start is not None:
                tags |= {"start": plan.start.name, "start.sha256": plan.start.sha256}
            self._run = store.open(plan.stage, tags, self._parent)
        write_json(plan.folder / RUN_NOTE, {"run": self._run})
        shared = config.training.model_dump(mode="json", exclude={"stage1", "stage2", "stage3"})
        own = config.training.stage(plan.stage).model_dump(mode="json")
        model = config.model.model_dump(mode="json")
        cluster = config.cluster.model_dump(mode="json", exclude={"environment"})
        vae = {"path": config.vae.path}
        store.params(self._run, {"training": shared | own, "model": model, "cluster": cluster, "vae": vae})
        self._known = store.steps_of(self._run, EVERY_STEP)
        self._known_previews = store.previews_of(self._run)
        self._store = store

    def _send_previews(self, store: Store, run: str) -> None:
        for picture in sorted((self._plan.folder / "previews").glob("step-*.png")):
            if picture.name not in self._known_previews:
                store.log_preview(run, picture)
                self._known_previews.add(picture.name)


def deliver_late(config: Config, plan: StagePlan, parent: str | None, project: Path = Path()) -> None:
    """Deliver a finished stage of which MLflow lacks something, because it was away when the stage ended.

    Args:
        config: all settings.
        plan: the stage; weights that were not trained here are left alone.
        parent: MLflow run of the whole training; None: there is none.
        project: the project's folder.
    """
    if (plan.folder / METRICS).is_file() and "model_version" not in read_run_note(plan.folder):
        delivery = Delivery(config, plan, parent, project)
        delivery.start()
        delivery.end("FINISHED", END_SECONDS)


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yield entries in calls of at most ``MOST`` values; the server has all of an entry or nothing of it."""
    batch: list[Entry] = []
    for entry in entries:
        if batch and sum(len(each.values) for each in [*batch, entry]) > MOST:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch
