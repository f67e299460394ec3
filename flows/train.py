"""Flow ``train``: the three progressive stages, one process group after the other.

Run it with ``python -m flows.train --stage stage3 -S training.stage1.steps=50``. Each stage starts from the EMA weights
of the stage before. A stage that is finished with these settings is skipped; an interrupted one resumes from its last
checkpoint. MLflow gets a parent run with a child run for each stage.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer
from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE

from flows.common import main
from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Config, Stage
from magicdrive_core.experiment.run_paths import RunPaths, find_run_paths
from magicdrive_core.tracking.runs import Status, best_effort, close_parent, open_parent
from magicdrive_core.training.delivery import CANCEL_SECONDS, deliver_late
from magicdrive_core.training.supervise import StageResult, train_stage


@task(cache_policy=NO_CACHE, task_run_name="{stage}")
def run_stage(stage: Stage, params: str, overrides: list[str], parent: str | None) -> StageResult:
    """Trains one stage. Call it, do not submit it: a cancellation reaches only the flow's own thread.

    Args:
        stage: "stage1", "stage2" or "stage3".
        params: the file of settings.
        overrides: ``key.key=value`` texts.
        parent: MLflow run of the whole training; None where MLflow did not answer.

    Returns:
        The finished stage.

    Raises:
        MagicDriveError: the stage before is not finished, or a rank failed.
    """
    return train_stage(params, overrides, stage, parent)


@flow(name="train", validate_parameters=False)
def train(stage: Stage = "stage3", params: str = "params.yaml", overrides: list[str] | None = None) -> str:
    """Trains the stages up to ``stage`` for which the data has clips.

    Args:
        stage: the last stage.
        params: the file of settings.
        overrides: ``key.key=value`` texts.

    Returns:
        The folder of the last trained stage.

    Raises:
        MagicDriveError: the data is missing or unfit, or a rank failed.
    """
    logger = get_run_logger()
    overrides = overrides or []
    config = load_config(params, overrides)
    paths = find_run_paths(config, stage)
    for note in paths.notes:
        logger.warning(note)
    if paths.model.done:
        logger.info("%s is finished: %s", paths.model.stage, paths.model.folder)
        for plan in paths.stages:
            deliver_late(config, plan, None)
    else:
        _train(config, paths, params, overrides)
    return str(paths.model.folder)


def _train(config: Config, paths: RunPaths, params: str, overrides: list[str]) -> None:
    os.environ.setdefault("PREFECT__FLOW_RUN_ID", str(runtime.flow_run.id))  # for lineage; a worker sets it itself
    parent = best_effort("the stages get no parent run", lambda: open_parent(config, f"train-{config.profile}"))
    status: Status = "KILLED"
    try:
        for plan in paths.stages:
            run_stage(plan.stage, params, overrides, parent)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if parent:
            best_effort("the parent run stays open", lambda: close_parent(config, parent, status), CANCEL_SECONDS)


def _command(
    stage: Annotated[Stage, typer.Option(help="Train up to this stage.")] = "stage3",
    params: str = "params.yaml",
    overrides: Annotated[list[str] | None, typer.Option("--set", "-S", metavar="KEY=VALUE")] = None,
) -> None:
    train(stage, params, overrides)


if __name__ == "__main__":
    main(lambda: typer.run(_command))
