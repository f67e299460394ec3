"""Paths of the results of params.yaml: the stages that the data can feed, weights, videos, package.

Folders are named by what decides their content, so that results of other settings stay beside them. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from magicdrive_core.config.schema import Config, Stage, fingerprint
from magicdrive_core.data.edits import chosen_edits
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.experiment.stages import StagePlan, feasibility, plan_stage
from magicdrive_core.tracking.found_model import REGISTERED, find_model
from magicdrive_core.tracking.lineage import read_run_note
from magicdrive_core.utils.files import read_json

# Settings of ``generate`` that decide how the work is executed; they change no pixel.
EXECUTION_SETTINGS = {
    *("workers", "task_runner", "scheduler", "sequence_parallel", "guidance_parallel", "offload", "compile")
}


@dataclass(frozen=True)
class RunPaths:
    """Where one configuration's training runs, videos and submission are written.

    Attributes:
        stages: The training runs, in order; or the one run that ``generate.weights`` names.
        notes: One line for each stage that the data has no clips for.
        generated: Folder of the generated items.
        submission: Folder of package, scores and report.
    """

    stages: list[StagePlan]
    notes: list[str]
    generated: Path
    submission: Path

    @property
    def model(self) -> StagePlan:
        """The run whose weights generate: the last stage."""
        return self.stages[-1]

    def trained_model(self) -> StagePlan:
        """The run whose weights generate, which must be finished.

        Raises:
            MagicDriveError: It is not.
        """
        if not self.model.done:
            raise MagicDriveError(f"{self.model.folder} holds no finished training", "python -m flows.train")
        return self.model

    def model_tags(self, config: Config) -> dict[str, str]:
        """Tags that identify the model which generates, for MLflow and for the manifests of packages.

        Args:
            config: All settings.

        Returns:
            Under ``model`` the value of ``generate.weights`` or the name of the run's folder; under ``model.sha256``
            the digest of the weights; under ``model.run`` the MLflow run, if there is one.

        Raises:
            MagicDriveError: The run is not finished.
        """
        facts = read_json(self.model.result)
        tags = {"model": config.generate.weights or self.model.folder.name, "model.sha256": facts["weights_sha256"]}
        run = read_run_note(self.model.folder).get("run")
        return tags | ({"model.run": run} if run else {})


def find_run_paths(config: Config, last: Stage = "stage3", project: Path = Path()) -> RunPaths:
    """Plan the training stages of a configuration and name the folders of its results.

    The stages end before the first one that has no training clip in any bucket. Where ``generate.weights`` names a
    network, that network takes the place of all stages and nothing is trained.

    Args:
        config: All settings.
        last: The last stage that is wanted.
        project: The project's folder.

    Returns:
        Stages and folders below ``project``; nothing is created.

    Raises:
        UsageError: Not even stage 1 has a clip, the registry knows no such model, or the edits file is unusable.
        MagicDriveError: The folder that ``generate.weights`` names holds no network, or the project has no infos.
    """
    notes: list[str] = []
    if config.generate.weights is not None:
        stages = [_named(config, config.generate.weights, project)]
    else:
        stages = _chain(plan_stage(config, _last_possible(config, last, project, notes), project))
    others = EXECUTION_SETTINGS - {"sequence_parallel"} | {"generations", "weights", "edits"}
    sampling = config.generate.model_dump(mode="json", exclude=others)
    sampling["edits"] = chosen_edits(config, project).digest
    generated = fingerprint(stages[-1].fingerprint, sampling, config.video, config.submission.frames)[:12]
    submission = fingerprint(generated, config.generate.generations, config.submission)[:12]
    outputs = project / "outputs"
    return RunPaths(stages, notes, outputs / f"generate-{generated}", outputs / f"submission-{submission}")


def pin_registered(config: Config, project: Path = Path()) -> list[str]:
    """Find out which versions of registered models the settings mean now, and pin them for all processes.

    An alias may be moved to another version while a flow runs.

    Args:
        config: All settings; ``generate.weights`` and ``training.start_from`` are looked at.
        project: The project's folder.

    Returns:
        One ``key=value`` override for each of the two that names a registered model; it names the version.

    Raises:
        UsageError: The registry knows no such model.
        MagicDriveError: The folder of its weights is missing, or the weights have changed.
    """
    named = {"generate.weights": config.generate.weights, "training.start_from": config.training.start_from}
    return [
        f"{key}={find_model(config.tracking, name, project).name}"
        for key, name in named.items()
        if name is not None and name.startswith(REGISTERED)
    ]


def _named(config: Config, weights: str, project: Path) -> StagePlan:
    """The run of a network that exists."""
    found = find_model(config.tracking, weights, project)
    return StagePlan(found.stage, found.folder, fingerprint(found.sha256, config.flow), inputs={}, previous=None)


def _last_possible(config: Config, last: Stage, project: Path, notes: list[str]) -> Stage:
    """The last stage with clips; a line is added to ``notes`` where that is not ``last``."""
    names: list[Stage] = []
    if last not in config.training.stages:
        raise UsageError(f"{last} comes before training.first_stage, which is {config.training.first_stage}")
    for stage in config.training.stages[: config.training.stages.index(last) + 1]:
        clips = feasibility(config, stage, project)
        if not clips.possible:
            wanted = ", ".join(clips.empty)
            if not names:
                raise UsageError(f"{stage}: the data has no training clip for {wanted}", "use longer scenes, or more")
            notes.append(f"{stage} is left out: the data has no training clip for {wanted}; {names[-1]} is the last")
            break
        names.append(stage)
    return names[-1]


def _chain(plan: StagePlan) -> list[StagePlan]:
    return [*(_chain(plan.previous) if plan.previous else []), plan]
