"""What one stage of training is: its folder, the fingerprint of all that decides its result, whether it is done.

No torch in here: flows and the launcher plan with it.
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
from magicdrive_core.tracking.lineage import input_digests
from magicdrive_core.utils.files import read_json, sha256_file, write_json

# Of the sections that all stages share: how often something is written decides nothing, and how steps are computed no
# more than the number of ranks does.
_UNIMPORTANT = {
    *("prefetch_mbytes", "checkpoint_every", "keep_checkpoints", "keep_every", "preview_every", "preview_clips"),
    *("log_every", "skip_empty", "max_skipped", "overlap_communication", "compile", "peak_tflops", *STAGES),
}


@dataclass(frozen=True)
class StagePlan:
    """One training of one stage. Equal fingerprints mean equal results."""

    stage: Stage
    folder: Path  # runs/<stage>-<first 12 digits of the fingerprint>, below the project's folder
    fingerprint: str
    inputs: dict[str, str]  # digest of each DVC output that is read
    previous: StagePlan | None  # whose EMA weights this one starts from

    @property
    def weights(self) -> Path:
        """The result: the network's state dict with EMA weights, fp32."""
        return self.folder / "ema.safetensors"

    @property
    def result(self) -> Path:
        """Facts of the finished run, with the digest of the weights."""
        return self.folder / "run.json"

    @property
    def done(self) -> bool:
        """Whether the weights are there and are those that the finished run wrote."""
        if not (self.weights.is_file() and self.result.is_file()):
            return False
        return read_json(self.result)["weights_sha256"] == sha256_file(self.weights)


def plan_stage(config: Config, stage: Stage, project: Path = Path()) -> StagePlan:
    """The plan of a stage and of those before it."""
    inputs = input_digests(project)
    plan: StagePlan | None = None
    for name in STAGES[: STAGES.index(stage) + 1]:
        shared = {k: v for k, v in config.training.model_dump(mode="json").items() if k not in _UNIMPORTANT}
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
        )
        plan = StagePlan(name, project / "runs" / f"{name}-{print_[:12]}", print_, inputs, plan)
    assert plan is not None
    return plan


@dataclass(frozen=True)
class Feasibility:
    """How many training clips each bucket of a stage has."""

    stage: Stage
    clips: dict[str, int]  # by bucket name
    possible: bool  # whether there is anything to train that the stage is for

    @property
    def empty(self) -> list[str]:
        """The buckets without a clip."""
        return [name for name, count in self.clips.items() if not count]

    @property
    def warning(self) -> str | None:
        """One line about buckets that are skipped."""
        return f"{self.stage}: no training clip for {', '.join(self.empty)}: skipped" if self.empty else None


def feasibility(config: Config, stage: Stage, project: Path = Path()) -> Feasibility:
    """Counts the training clips of a stage's buckets.

    A stage that has buckets of several frames is for videos: single pictures beside them do not make it possible.
    """
    scenes = [SceneHeader.of(scene) for scene in read_scenes(project / "artifacts/infos")]
    buckets = config.training.stage(stage).buckets
    clips = {bucket.name: len(bucket_clips(config, stage, bucket, scenes)) for bucket in buckets}
    videos = [bucket for bucket in buckets if bucket.frames > 1]
    return Feasibility(stage, clips, any(clips[bucket.name] for bucket in videos or buckets))


def bucket_clips(config: Config, stage: Stage, bucket: Bucket, scenes: Sequence[SceneHeader]) -> list[Clip]:
    """The training clips of a stage's bucket, in the order of the sampler's indices."""
    if config.training.stage(stage).balance:
        training = [scene for scene in scenes if scene.split in ("train", "both")]
        scenes = balance_weather(training, published=config.published)
    return bucket.repeat * list_clips(scenes, "train", bucket.frames, config.latents.start_stride, whole=bucket.whole)


def write_job(plan: StagePlan, config: Config) -> None:
    """Leaves in the plan's folder all that its ranks need, so that a later edit of params.yaml cannot reach them."""
    write_json(plan.folder / "job.json", {"config": config.model_dump(mode="json"), "plan": _plain(plan)})


def read_job(folder: Path) -> tuple[Config, StagePlan]:
    """What ``write_job`` left.

    Raises:
        MagicDriveError: there is no such job.
    """
    job = read_json(folder / "job.json", "start a training with: magicdrive train")
    return parse_config(job["config"], source=str(folder / "job.json")), _parse(job["plan"])


def _plain(plan: StagePlan) -> dict[str, Any]:
    return asdict(plan) | {
        "folder": str(plan.folder),
        "previous": _plain(plan.previous) if plan.previous else None,
    }


def _parse(values: dict[str, Any]) -> StagePlan:
    previous = values["previous"]
    return StagePlan(**values | {"folder": Path(values["folder"]), "previous": _parse(previous) if previous else None})
