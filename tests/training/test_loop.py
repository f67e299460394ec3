"""The loop on two gloo ranks: exact resume after every kind of end, and the files of a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Conditions, Config, StageConfig
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.stages import StagePlan, write_job
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.utils.files import read_json
from tests.training.gloo_ranks import RankError, run_distributed
from tests.training.networks import stage, training
from tests.training.tiny_rank import NeverStop, train_tiny

PROJECT = Path(__file__).resolve().parents[2]


def job(folder: Path, share: int = 1, **changes: object) -> StagePlan:
    """Write a job for ranks that share clips in groups of ``share``."""
    config = load_config(PROJECT / "profiles/demo.yaml")
    conditions = Conditions(map_cells={"16x16": 8} | config.conditions.map_cells)
    cluster = config.cluster.model_copy(update={"ranks": 2, "sequence_parallel": share})
    config = config.model_copy(update={"training": training(**changes), "conditions": conditions, "cluster": cluster})
    plan = StagePlan("stage1", folder, "f" * 64, {}, None)
    write_job(plan, config)
    return plan


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_once(folder: Path) -> int:
    return train_tiny(folder, NeverStop())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an uninterrupted training of eight steps."""
    folder = tmp_path_factory.mktemp("whole")
    plan = job(folder)
    assert run_distributed(train_once, 2, folder) == [0, 0]
    assert plan.done
    return folder


def assert_equal_ends(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    weights, expected = load_file(folder / "ema.safetensors"), load_file(whole / "ema.safetensors")
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert read_json(folder / "run.json")["weights_sha256"] == read_json(whole / "run.json")["weights_sha256"]


def test_a_run_writes_its_weights_and_result(whole: Path) -> None:
    facts = read_json(whole / "run.json")
    assert facts["steps"] == 8
    assert facts["ranks"] == 2
    assert len(losses(whole)) == 8
    assert facts["loss_first"] == pytest.approx(sum(losses(whole)[:4]) / 4)
    assert facts["loss_last"] == pytest.approx(sum(losses(whole)[4:]) / 4)
    assert set(load_file(whole / "ema.safetensors")) >= {"into.weight", "frozen.weight", "table"}
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert read_json(whole / "status.json")["step"] == 8
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line["bucket_losses"]} == {"16x16-1", "16x16-9"}
    assert [line["learning_rate"] for line in lines[:3]] == [0.005, 0.01, 0.01]


def test_changed_weights_are_not_a_finished_run(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    plan = StagePlan("stage1", tmp_path / "run", "f" * 64, {}, None)
    assert plan.done
    with plan.weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert not plan.done


@pytest.mark.parametrize(
    "damage", ["none", "cut off", "a byte flipped", "a shard missing", "no manifest", "half-written"]
)
def test_training_resumes_from_the_newest_intact_checkpoint(whole: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    job(folder)
    for name in ("ema.safetensors", "run.json"):
        (folder / name).unlink()
    newest = folder / "checkpoints/step-00000006"
    shard = newest / "shard-00001-of-00002.safetensors"
    whole_bytes = shard.read_bytes()
    if damage == "cut off":
        shard.write_bytes(whole_bytes[:-5])
    if damage == "a byte flipped":
        shard.write_bytes(whole_bytes[:-5] + bytes([whole_bytes[-5] ^ 1]) + whole_bytes[-4:])
    if damage == "a shard missing":
        shard.unlink()
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    if damage == "half-written":
        newest.rename(folder / "checkpoints/.step-00000006.partial")
    assert run_distributed(train_once, 2, folder) == [0, 0]
    assert_equal_ends(folder, whole)
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_damaged_line_of_the_history_costs_the_line_and_not_the_training(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    job(folder)
    for name in ("ema.safetensors", "run.json"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[3] = bytes(len(lines[3]))
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert run_distributed(train_once, 2, folder) == [0, 0]
    assert losses(folder) == [loss for step, loss in enumerate(losses(whole)) if step != 3]
    for name in ("ema.safetensors", "checkpoints/step-00000006/manifest.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_bf16_resumes_exactly(tmp_path: Path) -> None:
    job(tmp_path / "whole", precision="bf16")
    assert run_distributed(train_once, 2, tmp_path / "whole") == [0, 0]
    shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "again/checkpoints")
    job(tmp_path / "again", precision="bf16")
    assert run_distributed(train_once, 2, tmp_path / "again") == [0, 0]
    weights, expected = (load_file(tmp_path / name / "ema.safetensors") for name in ("again", "whole"))
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_ranks_that_share_clips_count_them_once_and_may_resume_apart(tmp_path: Path) -> None:
    """Two ranks share a micro-batch in each step; from step 6 on, each takes its own."""
    job(tmp_path, share=2)
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [round(line["clips_per_second"] * line["seconds"]) for line in lines] == [
        2 if "16x16-1" in line["bucket_losses"] else 1 for line in lines
    ]
    assert all(len(line["bucket_losses"]) == 1 for line in lines)
    state = tmp_path / "checkpoints/step-00000006/state.json"
    assert read_json(state)["progress"]["micro_batches"] == 6
    for name in ("ema.safetensors", "run.json"):
        (tmp_path / name).unlink()
    job(tmp_path)
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert losses(tmp_path)[:6] == [line["loss"] for line in lines[:6]]


def test_accumulated_micro_batches_equal_those_of_several_ranks(whole: Path, tmp_path: Path) -> None:
    """One rank with two micro-batches a step equals two ranks with one, to rounding; either resumes the other's run."""
    more = {"stage1": stage(accumulate=2)}
    job(tmp_path / "single", **more)
    assert run_distributed(train_once, 1, tmp_path / "single") == [0]
    lines, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "single", whole)
    )
    for own, other in zip(lines, expected, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert own["bucket_losses"] == pytest.approx(other["bucket_losses"], rel=1e-5)
        assert own["noise_losses"] == pytest.approx(other["noise_losses"], rel=1e-5)
        clips, others = (round(line["clips_per_second"] * line["seconds"]) for line in (own, other))
        assert clips == others
    order = [sorted((folder / "order.jsonl").read_text().splitlines()) for folder in (tmp_path / "single", whole)]
    assert order[0] == order[1]
    state = Path("checkpoints/step-00000006/state.json")
    assert read_json(tmp_path / "single" / state)["progress"]["micro_batches"] == 12
    shutil.copytree(tmp_path / "single/checkpoints", tmp_path / "two/checkpoints")
    job(tmp_path / "two", **more)
    assert run_distributed(train_once, 2, tmp_path / "two") == [0, 0]
    used = sorted(json.loads(line)[0] for line in (tmp_path / "two/order.jsonl").read_text().splitlines())
    assert used == list(range(12, 12 + 2 * 2 * 2))


def test_a_checkpoint_of_another_network_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole / "checkpoints", folder / "checkpoints")
    job(folder)
    faults = run_distributed(resume_other_network, 2, folder)
    assert all("belongs to another network: " in fault for fault in faults)


def resume_other_network(folder: Path) -> str:

    from magicdrive_core.training import checkpoints as checkpoint
    from magicdrive_core.training.state import Ema
    from tests.training.networks import TinyNetwork, engine_of

    engine = engine_of(TinyNetwork(width=9), training())
    with pytest.raises(MagicDriveError) as caught:
        checkpoint.resume(folder / "checkpoints", engine, Ema(engine, 0.9))
    return caught.value.message


class SlowPreview:
    """Is requested to stop while it is drawn."""

    def sample(self, _network: object, stop: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def train_until_signal(folder: Path, trouble: str) -> int:
    from magicdrive_core.training.worker import StopRequest

    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    stop = StopRequest()
    if trouble == "term before the first step" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    preview = SlowPreview() if trouble == "term in a preview" and dist.get_rank() == 0 else None
    code = train_tiny(folder, stop, trouble, preview)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    return code


@pytest.mark.parametrize("trouble", ["term-1-4", "usr2-0-4"])
def test_a_signal_to_one_rank_saves_on_all_and_resumes_exactly(whole: Path, tmp_path: Path, trouble: str) -> None:
    plan = job(tmp_path)
    assert run_distributed(train_until_signal, 2, tmp_path, trouble) == [RESUMABLE, RESUMABLE]
    assert not plan.done
    assert (tmp_path / "checkpoints/step-00000005").is_dir()
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)


def test_no_further_step_is_made_after_a_signal_in_a_preview_or_before_the_first(whole: Path, tmp_path: Path) -> None:
    """On a busy machine, a step may take longer than the grace that is left to save."""
    job(tmp_path, preview_every=2)
    assert run_distributed(train_until_signal, 2, tmp_path, "term before the first step") == [RESUMABLE] * 2
    assert losses(tmp_path) == []
    for steps in (2, 4):
        assert run_distributed(train_until_signal, 2, tmp_path, "term in a preview") == [RESUMABLE] * 2
        assert len(losses(tmp_path)) == steps
        assert (tmp_path / f"checkpoints/step-{steps:08d}").is_dir()
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)


def test_after_a_killed_rank_training_resumes_from_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    plan = job(tmp_path)
    with pytest.raises(RankError):
        run_distributed(train_until_signal, 2, tmp_path, "kill-1-4")
    assert not plan.done
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)


def rates(warmup: int, decay: int) -> list[float]:
    from magicdrive_core.training.loop import learning_rate

    bucket = {"resolution": "16x16", "frames": 1, "batch": 1}
    stage = StageConfig.model_validate(
        {"buckets": [bucket], "steps": 9, "seed": 0, "learning_rate": 0.4, "warmup": warmup, "decay": decay}
    )
    return [learning_rate(stage, step) for step in range(9)]


def test_the_learning_rate_warms_up_and_is_then_constant() -> None:
    assert run_distributed(rates, 2, 4, 0)[0] == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 6)
    assert run_distributed(rates, 2, 0, 0)[0] == [0.4] * 9


def test_the_learning_rate_falls_linearly_to_nothing_at_the_end_of_a_stage() -> None:
    assert run_distributed(rates, 2, 0, 4)[0] == pytest.approx([0.4] * 6 + [0.3, 0.2, 0.1])
    assert run_distributed(rates, 2, 4, 9)[0][:4] == pytest.approx([0.1, 0.2, 0.3, 0.4 * 6 / 9])


def test_jobs_are_read_as_they_were_written(tmp_path: Path) -> None:
    from magicdrive_core.experiment.stages import read_job

    first = StagePlan("stage1", tmp_path / "a", "1" * 64, {"artifacts/infos": "x"}, None)
    second = StagePlan("stage2", tmp_path / "b", "2" * 64, {}, first)
    config: Config = load_config(PROJECT / "profiles/demo.yaml")
    write_job(second, config)
    assert read_job(tmp_path / "b") == (config, second)
