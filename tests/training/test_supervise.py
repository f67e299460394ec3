"""Training a stage from outside; a function takes the place of the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Run
from safetensors.numpy import save

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Cluster, Stage, Tracking
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.experiment import stages as plan
from magicdrive_core.experiment.stages import read_job
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.launcher import check_ranks
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.tracking.runs import PARENT, Store
from magicdrive_core.training import supervise
from magicdrive_core.training.supervise import show_launch, train_stage
from magicdrive_core.utils.files import read_json, sha256_file, write_json
from tests.training.scenes import make_scene

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
PARENT_RUN = "0" * 32
WEIGHTS = save(  # of the demo's network, as far as its architecture shows
    {
        "before_proj.weight": np.zeros((128, 1)),
        **{f"base_blocks_s.{index}.gate": np.zeros(1) for index in range(4)},
        **{f"control_blocks_s.{index}.gate": np.zeros(1) for index in range(3)},
    }
)


class Ranks:
    """Replaces ``run_job``: returns the answers in turn; 0 writes the weights of a finished stage."""

    def __init__(self, *answers: int | BaseException) -> None:
        self.answers = list(answers)
        self.starts = 0

    def __call__(self, cluster: Cluster, this: Job, on_poll: Callable[[], None]) -> int:
        self.starts += 1
        write_json(this.status, {"step": 1, "steps": 2, "loss": 0.5, "clips_per_second": 3.0})
        (this.status.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 2.0}\n')
        on_poll()
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if answer == 0:
            folder = Path(this.command[-1])
            _, job = read_job(folder)
            job.weights.write_bytes(WEIGHTS)
            write_json(job.result, {"weights_sha256": sha256_file(job.weights), "loss_last": 0.5})
        return answer


@pytest.fixture
def train(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(plan, "read_scenes", lambda _: [make_scene("a", 30), make_scene("b", 30, "val")])
    write_json(project / "artifacts/encoders/encoders.json", {"vae": {"latent_channels": 4}, "text": {"width": 8}})

    def run(ranks: Ranks, stage: Stage = "stage1", overrides: list[str] | None = None) -> Any:
        monkeypatch.setattr(supervise, "run_job", ranks)
        return train_stage(PROFILE, overrides, stage, PARENT_RUN, project)

    return run


def only_run(project: Path) -> Run:
    store = Store(Tracking(), project)
    (run,) = store.client.search_runs([store.experiment])
    return run


def test_a_stage_is_trained_once(project: Path, train: Callable[..., Any]) -> None:
    parent = Store(Tracking(), project)
    result = train(Ranks(0), overrides=["training.stage1.learning_rate=0.001"])
    assert not result.skipped
    assert result.weights.read_bytes() == WEIGHTS
    run = only_run(project)
    assert run.info.status == "FINISHED"
    assert run.info.run_id == result.run
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.tags[PARENT] == PARENT_RUN
    assert run.data.tags["weights_sha256"] == sha256_file(result.weights)
    assert run.data.tags["stage"] == "stage1"
    assert parent.client.get_model_version_by_alias("magicdrive-demo", "stage1").run_id == result.run


def test_a_finished_stage_is_skipped_and_noted_in_the_parent(project: Path, train: Callable[..., Any]) -> None:
    first = train(Ranks(0))
    store = Store(Tracking(), project)
    parent = store.open("train-demo", {})
    again = train_stage(PROFILE, None, "stage1", parent, project)
    assert again.skipped
    assert again.run == first.run
    assert store.client.get_run(parent).data.tags["reused.stage1"] == first.run


def test_ranks_that_saved_are_started_again_in_the_same_run(project: Path, train: Callable[..., Any]) -> None:
    ranks = Ranks(RESUMABLE, RESUMABLE, 0)
    result = train(ranks)
    assert ranks.starts == 3
    assert only_run(project).info.status == "FINISHED"
    assert only_run(project).info.run_id == result.run


@pytest.mark.parametrize(
    ("error", "status"), [(MagicDriveError("rank 1 failed"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_an_interrupted_stage_resumes_in_its_run(
    project: Path, train: Callable[..., Any], error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)):
        train(Ranks(error))
    run = only_run(project)
    assert run.info.status == status
    assert train(Ranks(0), overrides=["cluster.ranks=1"]).run == run.info.run_id
    again = only_run(project)
    assert again.info.status == "FINISHED"
    assert again.data.tags["resumed.cluster.ranks"] == "1"


def test_ranks_that_end_without_a_result_are_an_error(project: Path, train: Callable[..., Any]) -> None:
    with pytest.raises(MagicDriveError, match="stage1 stopped without weights after 20 starts"):
        train(Ranks(*[RESUMABLE] * supervise.RESTARTS))
    assert only_run(project).info.status == "FAILED"


def test_a_stage_needs_the_previous_stage(train: Callable[..., Any]) -> None:
    with pytest.raises(MagicDriveError, match="stage2 starts from stage1, which was not trained with these settings"):
        train(Ranks(), "stage2")


def test_the_run_of_the_previous_stage_is_tagged(project: Path, train: Callable[..., Any]) -> None:
    first, second = train(Ranks(0)), train(Ranks(0), "stage2")
    tags = Store(Tracking(), project).client.get_run(second.run).data.tags
    assert tags["previous.run"] == first.run
    _, job = read_job(second.folder)
    assert job.previous is not None
    assert job.previous.weights == first.weights


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stage1.mask_ratios={middle: 0.5}", "middle is no kind of mask"),
        ("training.stage1.buckets=[{resolution: 80x144, frames: 65, batch: 1}]", "no training clip for 80x144-65"),
        (
            "training.stage1.buckets=[{resolution: 80x144, frames: 1, batch: 99}]",
            r"a micro-batch of 80x144-1 has 99 clips, and the data has \d+ ",
        ),
    ],
)
def test_impossible_settings_start_nothing(
    project: Path, train: Callable[..., Any], override: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(Ranks(), overrides=[override])
    assert not (project / "runs").exists()


def test_one_bucket_without_data_is_refused_unless_it_may_be_left_out(train: Callable[..., Any]) -> None:
    buckets = "[{resolution: 80x144, frames: 9, batch: 1}, {resolution: 80x144, frames: 65, batch: 1}]"
    overrides = [f"training.stage1.buckets={buckets}", "training.skip_empty=false"]
    ranks = Ranks(0)
    with pytest.raises(UsageError, match="no training clip for 80x144-65") as caught:
        train(ranks, overrides=overrides)
    assert "training.skip_empty" in caught.value.hint
    assert not ranks.starts
    assert not train(ranks, overrides=[*overrides[:1], "training.skip_empty=true"]).skipped


def test_ranks_read_the_settings_with_which_they_were_started(train: Callable[..., Any]) -> None:
    result = train(Ranks(0), overrides=["cluster.threads=1", "training.log_every=7"])
    config, _ = read_job(result.folder)
    assert config == load_config(PROFILE, ["cluster.threads=1", "training.log_every=7"])
    assert read_json(result.folder / "mlflow.json") == {"run": result.run, "model_version": "1"}


def test_a_stage_that_memory_cannot_hold_is_refused_before_anything_starts(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magicdrive_core.training.budget.memory_left", lambda: 1 << 16)
    ranks = Ranks(0)
    with pytest.raises(MagicDriveError, match=r"a micro-batch of .* are left for each of 2 ranks"):
        train(ranks)
    assert not ranks.starts


def test_weights_of_another_network_are_refused_before_anything_starts(train: Callable[..., Any]) -> None:
    first = train(Ranks(0))
    weights = save({"before_proj.weight": np.zeros((64, 1))})
    first.weights.write_bytes(weights)
    write_json(
        first.folder / "run.json",
        read_json(first.folder / "run.json") | {"weights_sha256": hashlib.sha256(weights).hexdigest()},
    )
    ranks = Ranks(0)
    with pytest.raises(MagicDriveError, match=r"another network: model\.width is 128 in params\.yaml, 64 in the file"):
        train(ranks, "stage2")
    assert not ranks.starts


def test_a_dry_run_submits_nothing(project: Path, train: Callable[..., Any]) -> None:
    settings = ["cluster.launcher=slurm", "cluster.slurm={}", "cluster.hosts=4"]
    script = show_launch(PROFILE, settings, "stage2", project)
    assert "#SBATCH --nodes=4" in script
    assert not (project / "runs").exists()
    with pytest.raises(UsageError, match="no training clip"):
        show_launch(
            PROFILE, ["training.stage1.buckets=[{resolution: 80x144, frames: 65, batch: 1}]"], "stage1", project
        )


@pytest.mark.parametrize(("visible", "fits"), [(None, False), ("0", False), ("", True), ("-1", True)])
def test_more_ranks_than_the_host_has_devices_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, fits: bool
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr("magicdrive_core.launch.launcher.version", lambda _: "2.13.0+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cluster = Cluster(ranks=4)
    if fits:
        check_ranks(cluster, tmp_path)
    else:
        with pytest.raises(UsageError, match=r"cluster\.ranks 4 is more than the [13] devices") as caught:
            check_ranks(cluster, tmp_path)
        assert "cluster.ranks=" in caught.value.hint
    check_ranks(Cluster.model_validate({"ranks": 4, "launcher": "slurm", "slurm": {}}), tmp_path)
