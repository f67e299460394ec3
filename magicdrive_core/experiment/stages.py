"""Training stages: the folder of a run, the fingerprint of everything that decides its result, whether it is done.

Flows and the launcher plan with this module, so it does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from magicdrive_core.config.load import parse_config
from magicdrive_core.config.schema import STAGES, Bucket, Config, Stage, fingerprint
from magicdrive_core.config.versions import training_versions
from magicdrive_core.data.clips import balance_weather, list_clips
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.records import Clip, SceneHeader
from magicdrive_core.errors import UsageError
from magicdrive_core.tracking.found_model import FoundModel, find_model
from magicdrive_core.tracking.lineage import input_digests
from magicdrive_core.utils.files import read_json, sha256_file, write_json

# Settings of all stages that do not decide the result: how often something is written, and how steps are computed.
_UNIMPORTANT = {
    *("prefetch_mbytes", "checkpoint_every", "keep_checkpoints", "keep_every", "preview_every", "preview_clips"),
    *("log_every", "skip_empty", "max_skipped", "overlap_communication", "compile", "peak_tflops", *STAGES),
}
# Count through what they lead to: the digest of the weights, the chain of stages.
_START = {"start_from", "first_stage"}
# Count where they are set, so that a run without them keeps its fingerprint.
_CHOICES = ("train_only", "freeze", "lora")


@dataclass(frozen=True)
class StagePlan:
    """One training run of one stage; equal fingerprints mean equal results.

    With ``previous`` and ``start``, the weights are those of ``previous``, and ``start`` has what this stage adds.
    """

    stage: Stage
    folder: Path  # runs/<stage>-<first 12 digits of the fingerprint>, below the project's folder
    fingerprint: str
    inputs: dict[str, str]  # digest of each DVC output that is read
    previous: StagePlan | None  # whose EMA weights this one starts from
    start: FoundModel | None = None  # the model that the whole training starts from

    @property
    def weights(self) -> Path:
        """File of the resulting EMA weights: the network's state dict in fp32."""
        return self.folder / "ema.safetensors"

    @property
    def result(self) -> Path:
        """File of the facts of the finished run, among them the digest of the weights."""
        return self.folder / "run.json"

    @property
    def done(self) -> bool:
        """Whether the weights exist and are those that the finished run wrote; reads the whole file for its digest."""
        if not (self.weights.is_file() and self.result.is_file()):
            return False
        return read_json(self.result)["weights_sha256"] == sha256_file(self.weights)


def plan_stage(config: Config, stage: Stage, project: Path = Path()) -> StagePlan:
    """Plan a stage and the stages before it.

    Args:
        config: All settings.
        stage: The last stage of the plan; its ``previous`` leads to the earlier ones.
        project: The project's folder.

    Returns:
        The plan; nothing is created.

    Raises:
        UsageError: The stage comes before ``training.first_stage``, or ``training.start_from`` names no model.
        MagicDriveError: ``dvc.lock`` is not YAML, or the model to start from is unusable.
    """
    training = config.training
    if stage not in training.stages:
        raise UsageError(
            f"{stage} comes before training.first_stage, which is {training.first_stage}",
            f"train {training.first_stage}, which starts from {training.start_from}",
        )
    inputs = input_digests(project)
    start = find_model(config.tracking, training.start_from, project) if training.start_from else None
    values = training.model_dump(mode="json")
    shared = {k: v for k, v in values.items() if k not in {*_UNIMPORTANT, *_START, *_CHOICES}}
    choices = {key: values[key] for key in _CHOICES if values[key]}
    plan: StagePlan | None = None
    for name in training.stages[: training.stages.index(stage) + 1]:
        print_ = fingerprint(
            *(
                config.published,
                config.data,
                config.conditions,
                config.vae,
                config.text,
                config.latents,
                config.flow,
                config.model,
            ),
            *(shared, name, config.training.stage(name), inputs, training_versions()),
            plan.fingerprint if plan else None,
            *([choices] if choices else []),
            *([start.sha256] if start else []),
        )
        plan = StagePlan(name, project / "runs" / f"{name}-{print_[:12]}", print_, inputs, plan, start)
    assert plan is not None
    return plan


@dataclass(frozen=True)
class Feasibility:
    """Numbers of training clips in the buckets of a stage."""

    stage: Stage
    clips: dict[str, int]  # by bucket name
    possible: bool  # whether the stage has clips of the kind that it trains

    @property
    def empty(self) -> list[str]:
        """The buckets without a clip."""
        return [name for name, count in self.clips.items() if not count]

    @property
    def warning(self) -> str | None:
        """One line that names the skipped buckets, or None."""
        return f"{self.stage}: no training clip for {', '.join(self.empty)}: skipped" if self.empty else None


def feasibility(config: Config, stage: Stage, project: Path = Path()) -> Feasibility:
    """Count the training clips of a stage's buckets.

    A stage with buckets of several frames trains on videos, so clips of single frames do not make it possible.

    Args:
        config: All settings.
        stage: Whose buckets are filled.
        project: The project's folder, with the infos.

    Returns:
        Clips by bucket, and whether the stage can be trained.

    Raises:
        MagicDriveError: The project has no infos.
    """
    scenes = [SceneHeader.of(scene) for scene in read_scenes(project / "artifacts/infos")]
    buckets = config.training.stage(stage).buckets
    clips = {bucket.name: len(bucket_clips(config, stage, bucket, scenes)) for bucket in buckets}
    videos = [bucket for bucket in buckets if bucket.frames > 1]
    return Feasibility(stage, clips, any(clips[bucket.name] for bucket in videos or buckets))


def bucket_clips(config: Config, stage: Stage, bucket: Bucket, scenes: Sequence[SceneHeader]) -> list[Clip]:
    """List the training clips of a bucket; the sampler's indices count in this order.

    Args:
        config: All settings.
        stage: Whose ``balance`` decides whether scenes of rare weather are repeated.
        bucket: Length of the clips, how often they are repeated, whether a clip is a whole scene.
        scenes: All scenes of the data set; those for training are used.

    Returns:
        The clips; a repeated clip is in the list more than once.
    """
    if config.training.stage(stage).balance:
        training = [scene for scene in scenes if scene.split in ("train", "both")]
        scenes = balance_weather(training, published=config.published)
    return bucket.repeat * list_clips(scenes, "train", bucket.frames, config.latents.start_stride, whole=bucket.whole)


def write_job(plan: StagePlan, config: Config) -> None:
    """Write everything that the ranks need into the run's folder; later edits of params.yaml do not affect the run.

    Only the owner can read the file, because ``tracking.uri`` may hold a password; the ranks' variables are not in it.

    Args:
        plan: The stage, in whose folder ``job.json`` is written.
        config: All settings, with overrides applied.
    """
    settings = config.model_dump(mode="json", exclude={"cluster": {"environment"}})
    write_json(plan.folder / "job.json", {"config": settings, "plan": _plain(plan)}, private=True)


def read_job(folder: Path) -> tuple[Config, StagePlan]:
    """Read what ``write_job`` wrote.

    Args:
        folder: Folder of the run.

    Returns:
        All settings and the plan of the stage.

    Raises:
        MagicDriveError: The folder holds no job.
    """
    job = read_json(folder / "job.json", "start a training with: magicdrive train")
    return parse_config(job["config"], source=str(folder / "job.json")), _parse(job["plan"])


def _plain(plan: StagePlan) -> dict[str, Any]:
    return asdict(plan) | {
        "folder": str(plan.folder),
        "previous": _plain(plan.previous) if plan.previous else None,
        "start": asdict(plan.start) | {"folder": str(plan.start.folder)} if plan.start else None,
    }


def _parse(values: dict[str, Any]) -> StagePlan:
    previous, start = values["previous"], values["start"]
    parsed = {
        "folder": Path(values["folder"]),
        "previous": _parse(previous) if previous else None,
        "start": FoundModel(**start | {"folder": Path(start["folder"])}) if start else None,
    }
    return StagePlan(**values | parsed)
