"""Trains one stage from outside the ranks: skips a finished stage, starts and restarts the ranks, reports to MLflow.

No torch in here: the ranks (worker.py) are processes of a group that the launcher starts.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress, TaskID
from safetensors import SafetensorError, safe_open

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Model, Stage
from magicdrive_core.diffusion.frame_masks import check_ratios
from magicdrive_core.errors import ERROR_NOTE, MagicDriveError, UsageError
from magicdrive_core.experiment.stages import StagePlan, feasibility, plan_stage, write_job
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.launcher import check_ranks, run_job, show_job
from magicdrive_core.launch.process_group import RESUMABLE, RESUME_HINT
from magicdrive_core.tracking.lineage import read_run_note
from magicdrive_core.tracking.runs import Store, best_effort
from magicdrive_core.training.budget import plan_budget
from magicdrive_core.training.delivery import CANCEL_SECONDS, END_SECONDS, Delivery, deliver_late
from magicdrive_core.utils.files import read_json
from magicdrive_core.utils.progress import progress_bar

logger = logging.getLogger(__name__)

RESTARTS = 20  # starts at most, of ranks that saved a checkpoint and exited with RESUMABLE


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        stage: its name.
        folder: the run's folder.
        weights: EMA weights, fp32.
        run: MLflow's run id; None as long as MLflow did not answer.
        skipped: whether it was finished before.
        facts: the content of run.json.
    """

    stage: Stage
    folder: Path
    weights: Path
    run: str | None
    skipped: bool
    facts: dict[str, Any]


def train_stage(
    config_path: Path | str, overrides: list[str] | None, stage: Stage, parent_run: str | None, project: Path = Path()
) -> StageResult:
    """Train a stage from its newest checkpoint; a finished stage is returned as it is.

    Args:
        config_path: params.yaml.
        overrides: ``key=value`` texts that change it; None: no changes.
        stage: "stage1", "stage2" or "stage3".
        parent_run: MLflow run of the whole training, to which this stage's run belongs; None: it belongs to none.
        project: the project's folder.

    Returns:
        The finished stage, with its weights and the content of run.json.

    Raises:
        UsageError: the stage has no data, or the settings are impossible; nothing was started.
        MagicDriveError: the previous stage is not finished, or a rank failed.
    """
    config = load_config(config_path, overrides)
    plan = plan_stage(config, stage, project)
    if plan.done:
        logger.info("%s is finished: %s", stage, plan.folder)
        deliver_late(config, plan, parent_run, project)
        run = read_run_note(plan.folder).get("run")
        if parent_run:
            what, tag = f"the parent run is not told of {plan.folder}", f"reused.{stage}"
            best_effort(
                what, lambda: Store(config.tracking, project).client.set_tag(parent_run, tag, run or plan.folder)
            )
        return StageResult(stage, plan.folder, plan.weights, run, True, read_json(plan.result))
    _check_settings(config, plan, project)
    _check_previous(config, plan)
    if config.cluster.launcher == "local":  # elsewhere the ranks measure their own host
        plan_budget(config, stage, project)
    write_job(plan, config)
    delivery = Delivery(config, plan, parent_run, project)
    delivery.start()
    try:
        _run_until_done(config, plan)
    except Exception:
        delivery.end("FAILED", END_SECONDS)
        raise
    except BaseException:  # an orchestrator's cancellation, a signal
        delivery.end("KILLED", CANCEL_SECONDS)
        raise
    delivery.end("FINISHED", END_SECONDS)
    return StageResult(stage, plan.folder, plan.weights, delivery.run, False, read_json(plan.result))


def show_launch(config_path: Path | str, overrides: list[str] | None, stage: Stage, project: Path = Path()) -> str:
    """Show what ``train_stage`` would start. Nothing is started or written.

    Args:
        config_path: params.yaml.
        overrides: ``key=value`` texts that change it; None: no changes.
        stage: "stage1", "stage2" or "stage3".
        project: the project's folder.

    Returns:
        A batch script, a manifest, or a command line, with a line end.

    Raises:
        UsageError: the settings are impossible.
    """
    config = load_config(config_path, overrides)
    plan = plan_stage(config, stage, project)
    _check_settings(config, plan, project)
    return show_job(config.cluster, _job(config, plan))


def _check_settings(config: Config, plan: StagePlan, project: Path) -> None:
    check_ranks(config.cluster)
    check_ratios(config.training.stage(plan.stage).mask_ratios, plan.stage)
    _check_start(config, plan, project)
    clips = feasibility(config, plan.stage, project)
    if not clips.possible:
        raise UsageError(
            f"{plan.stage}: the data has no training clip for {', '.join(clips.empty)}",
            "use shorter clips in the stage's buckets, or longer scenes; single key frames allow stage 1 only",
        )
    if clips.empty and not config.training.skip_empty:
        raise UsageError(
            f"{plan.stage}: the data has no training clip for {', '.join(clips.empty)}",
            f"remove it from training.{plan.stage}.buckets, or set training.skip_empty to true",
        )
    for bucket in config.training.stage(plan.stage).buckets:
        if 0 < clips.clips[bucket.name] < bucket.batch:
            raise UsageError(
                f"{plan.stage}: a micro-batch of {bucket.name} has {bucket.batch} clips, and the data has"
                f" {clips.clips[bucket.name]}",
                f"set its batch in training.{plan.stage}.buckets to {clips.clips[bucket.name]} or less, or use more"
                " scenes",
            )
    if clips.warning:
        logger.warning(clips.warning)


def _check_start(config: Config, plan: StagePlan, project: Path) -> None:
    """Check start, choice of parameters and memory of the devices in a process that may import torch.

    Raises:
        MagicDriveError: what the check found; a UsageError where the settings are at fault.
    """
    training = config.training
    chosen = plan.start or training.train_only or training.freeze or training.lora or config.cluster.device_gbytes
    if not chosen or not find_spec("torch"):
        return
    with TemporaryDirectory(prefix="magicdrive-") as folder:
        write_job(replace(plan, folder=Path(folder)), config)
        note = Path(folder) / "error.json"
        command = [sys.executable, "-m", "magicdrive_core.training.check_start", folder, str(project)]
        done = subprocess.run(command, env=os.environ | {ERROR_NOTE: str(note)}, stdin=subprocess.DEVNULL, check=False)
        if note.is_file():
            message, hint, exit_code = read_json(note)
            raise (UsageError if exit_code == UsageError.exit_code else MagicDriveError)(message, hint)
        if done.returncode:
            raise MagicDriveError("the check of what the training starts from failed", "see the lines above")


def _check_previous(config: Config, plan: StagePlan) -> None:
    if plan.previous is not None and plan.previous.done:
        check_architecture(plan.previous.weights, config.model)
    elif plan.previous is not None:
        raise MagicDriveError(
            f"{plan.stage} starts from {plan.previous.stage}, which was not trained with these settings: "
            f"{plan.previous.folder} is missing or incomplete",
            f"magicdrive train {plan.previous.stage}",
        )


def check_architecture(path: Path, model: Model) -> None:
    """Compare the widths and depths in a safetensors file's header with the model section; no torch is needed.

    Args:
        path: weights of a network by name; no tensor is read.
        model: ``width``, ``depth`` and ``control_depth`` are compared.

    Raises:
        MagicDriveError: they differ, or the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MagicDriveError(
            f"{path} is not a safetensors file: {error}", "move its folder away to train it again"
        ) from None
    found = {
        "width": shapes.get("before_proj.weight", (0,))[0],
        "depth": _blocks(shapes, "base_blocks_s"),
        "control_depth": _blocks(shapes, "control_blocks_s"),
    }
    for name, value in found.items():
        wanted = getattr(model, name)
        if value != wanted:
            raise MagicDriveError(
                f"{path} belongs to another network: model.{name} is {wanted} in params.yaml, {value} in the file",
                f"set model.{name} back, or move the file's folder away to train it again",
            )


def _blocks(shapes: dict[str, tuple[int, ...]], group: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{group}.")})


def _run_until_done(config: Config, plan: StagePlan) -> None:
    job = _job(config, plan)
    for starts in range(1, RESTARTS + 1):  # noqa: B007 - the message has it
        with progress_bar() as bar:
            watch = _Bar(bar, plan.stage, config.training.stage(plan.stage).steps, job.status)
            code = run_job(config.cluster, job, watch.update)
            watch.update()
        if code != RESUMABLE:
            break
        logger.warning("%s saved a checkpoint and stopped; starting it again", plan.stage)
    if not plan.done:
        raise MagicDriveError(
            f"{plan.stage} stopped without weights after {starts} starts; log: {plan.folder / 'log.txt'}",
            RESUME_HINT,
        )


def _job(config: Config, plan: StagePlan) -> Job:
    return Job.of(
        config.cluster,
        f"magicdrive-{plan.folder.name}",
        ["-m", "magicdrive_core.training.worker", str(plan.folder)],
        folder=plan.folder / "launch",
        log=plan.folder / "log.txt",
        status=plan.folder / "status.json",
        environment={"PYTHONWARNINGS": "ignore:Please install"},  # ColossalAI warns of each optional package
    )


class _Bar:
    """A progress bar that follows rank 0's status.json."""

    def __init__(self, bar: Progress, stage: Stage, steps: int, status: Path) -> None:
        self._bar, self._stage, self._status = bar, stage, status
        self._task: TaskID = bar.add_task(f"{stage}: starting", total=steps)

    def update(self) -> None:
        if not self._status.is_file():
            return
        facts = read_json(self._status)
        loss = "no loss yet" if facts["loss"] is None else f"loss {facts['loss']:.3f}"
        pace = f"{facts['clips_per_second']:.1f} clips/s"
        self._bar.update(self._task, completed=facts["step"], description=f"{self._stage}: {loss}, {pace}")
