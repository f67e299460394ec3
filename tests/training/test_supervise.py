"""What the launcher does around the ranks; the ranks themselves are stood in for by a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from magicdrive_core.config import Stage, Tracking
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.files import read_json, sha256_file, write_json
from magicdrive_core.launch import RESUMABLE
from magicdrive_core.settings import load_config
from magicdrive_core.tracking.runs import PARENT, Store
from magicdrive_core.training import plan, supervise
from magicdrive_core.training.plan import read_job
from magicdrive_core.training.supervise import train_stage
from tests.training.scenes import make_scene

PROFILE = Path(__file__).resolve().parents[2] / "profiles/demo.yaml"
PARENT_RUN = "0" * 32


class Ranks:
    """Stands in for ``run_group``: gives the answers in turn; 0 leaves the weights of a finished stage."""

    def __init__(self, *answers: int | BaseException) -> None:
        self.answers = list(answers)
        self.environments: list[dict[str, str]] = []

    def __call__(
        self,
        command: list[str],
        ranks: int,
        *,
        status: Path,
        environment: dict[str, str],
        on_poll: Callable[[], None],
        **_: Any,
    ) -> int:
        self.environments.append(environment)
        write_json(status, {"step": 1, "steps": 2, "loss": 0.5, "clips_per_second": 3.0})
        on_poll()
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if answer == 0:
            folder = Path(command[-1])
            _, job = read_job(folder)
            job.weights.write_bytes(b"weights")
            facts = {"weights_sha256": sha256_file(job.weights), "run": environment["MLFLOW_RUN_ID"], "loss_last": 0.5}
            write_json(job.result, facts)
        return answer


@pytest.fixture
def train(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(plan, "read_scenes", lambda _: [make_scene("a", 30), make_scene("b", 30, "val")])
    write_json(project / "artifacts/encoders/encoders.json", {"vae": {"latent_channels": 4}, "text": {"width": 8}})

    def run(ranks: Ranks, stage: Stage = "stage1", overrides: list[str] | None = None) -> Any:
        monkeypatch.setattr(supervise, "run_group", ranks)
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
    assert result.weights.read_bytes() == b"weights"
    run = only_run(project)
    assert run.info.status == "FINISHED"
    assert run.info.run_id == result.run
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.tags[PARENT] == PARENT_RUN
    assert run.data.tags["weights_sha256"] == sha256_file(result.weights)
    assert run.data.tags["stage"] == "stage1"
    assert parent.client.get_model_version_by_alias("magicdrive-demo", "stage1").run_id == result.run


def test_a_done_stage_is_skipped_and_noted_in_the_parent(project: Path, train: Callable[..., Any]) -> None:
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
    assert [environment["MLFLOW_RUN_ID"] for environment in ranks.environments] == [result.run] * 3
    assert only_run(project).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status"), [(MagicDriveError("rank 1 failed"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_an_interrupted_stage_goes_on_in_its_run(
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
    with pytest.raises(MagicDriveError, match="ended without its weights"):
        train(Ranks(*[RESUMABLE] * supervise.RESTARTS))
    assert only_run(project).info.status == "FAILED"


def test_a_stage_needs_the_one_before(train: Callable[..., Any]) -> None:
    with pytest.raises(MagicDriveError, match="stage2 starts from stage1, which is not trained with these settings"):
        train(Ranks(), "stage2")


def test_the_run_of_the_stage_before_is_told(project: Path, train: Callable[..., Any]) -> None:
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
        ("training.stage1.buckets=[{size: 112x200, frames: 65, batch: 1}]", "no training clip for 112x200-65"),
    ],
)
def test_impossible_settings_start_nothing(
    project: Path, train: Callable[..., Any], override: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(Ranks(), overrides=[override])
    assert not (project / "runs").exists()


def test_ranks_read_the_settings_of_their_start(train: Callable[..., Any]) -> None:
    result = train(Ranks(0), overrides=["cluster.threads=1", "training.log_every=7"])
    config, _ = read_job(result.folder)
    assert config == load_config(PROFILE, ["cluster.threads=1", "training.log_every=7"])
    assert read_json(result.folder / "mlflow.json") == {"run": result.run}


def test_a_stage_that_memory_cannot_hold_is_refused_before_anything_starts(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magicdrive_core.training.budget.memory_left", lambda: 1 << 20)
    ranks = Ranks(0)
    with pytest.raises(MagicDriveError, match=r"a micro-batch of .* are left for each of 2 ranks"):
        train(ranks)
    assert not ranks.environments
