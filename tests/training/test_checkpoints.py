"""Checkpoints beside the training: full disks, what is kept, other numbers of ranks, kills while writing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from magicdrive_core.data.buckets import BucketSampler
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.training.checkpoints import checkpoints, newest, step_of
from magicdrive_core.utils.files import sha256_file
from tests.training.gloo_ranks import RankError, run_distributed
from tests.training.test_loop import assert_equal_ends, job, losses, train_once, train_until_signal, whole

__all__ = ["whole"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def train_on_a_disk_that_fills_up(folder: Path, rank: int, file: str) -> int:
    """Train; the disk is full the first time that ``rank`` calls ``file``."""
    import torch.distributed as dist

    from magicdrive_core.training import checkpoints as saving

    real = getattr(saving, file)
    full = [dist.get_rank() == rank]

    def write(*arguments: Any) -> None:
        if full[0]:
            full[0] = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    with mock.patch.object(saving, file, write):
        return train_once(folder)


@pytest.mark.parametrize(("rank", "file"), [(0, "save_file"), (1, "save_file"), (0, "write_json")])
def test_a_full_disk_costs_one_checkpoint_and_not_the_training(
    whole: Path, tmp_path: Path, rank: int, file: str
) -> None:
    job(tmp_path)
    assert run_distributed(train_on_a_disk_that_fills_up, 2, tmp_path, rank, file) == [0, 0]
    assert names(tmp_path) == ["step-00000006"]
    assert_equal_ends(tmp_path, whole)


def warnings_of_a_full_disk(folder: Path) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("magicdrive_core.training.checkpoints").addHandler(handler)
    train_on_a_disk_that_fills_up(folder, 1, "save_file")
    logging.getLogger("magicdrive_core.training.checkpoints").removeHandler(handler)
    return lines


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    job(tmp_path)
    first, second = run_distributed(warnings_of_a_full_disk, 2, tmp_path)
    (line,) = first
    assert line == "checkpoint of step 3 was not saved: rank 1 could not write; training continues"
    (line,) = second
    assert line.startswith("checkpoint of step 3: no space left on the disk of ")


def broken_writer(folder: Path) -> str:
    from magicdrive_core.training import checkpoints as saving

    with mock.patch.object(saving, "save_file", side_effect=ValueError("a fault of the program")):
        try:
            train_once(folder)
        except ValueError as error:
            return str(error)
    return "nothing was raised"


def test_other_faults_of_the_writer_end_the_training(tmp_path: Path) -> None:
    job(tmp_path)
    assert run_distributed(broken_writer, 2, tmp_path) == ["a fault of the program"] * 2


def test_the_newest_checkpoints_are_kept_and_some_for_good(tmp_path: Path) -> None:
    job(tmp_path, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    assert run_distributed(train_once, 1, tmp_path) == [0]
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7)]
    assert set(json.loads((tmp_path / "checkpoints/step-00000007/manifest.json").read_text())) == {
        "shard-00000-of-00001.safetensors",
        "fixed.safetensors",
        "state.json",
    }


def test_other_numbers_of_ranks_resume_with_the_same_data(whole: Path, tmp_path: Path) -> None:
    """On 2 ranks, then 1, then 2 again, every micro-batch is used once, in one order."""
    job(tmp_path)
    assert run_distributed(train_until_signal, 2, tmp_path, "term-1-2") == [RESUMABLE] * 2
    assert run_distributed(train_until_signal, 1, tmp_path, "term-0-8") == [RESUMABLE]
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert losses(tmp_path)[:3] == losses(whole)[:3]
    assert all(loss == loss for loss in losses(tmp_path))
    assert len(losses(tmp_path)) == 8
    used = sorted(json.loads(line) for line in (tmp_path / "order.jsonl").read_text().splitlines())
    stream = BucketSampler([7, 5], [2, 1], 1, 0, 3).stream()
    assert used == [[index, *next(stream)] for index in range(3 * 2 + 3 * 1 + 2 * 2)]


def test_one_rank_reads_what_two_wrote_and_two_read_what_one_wrote(whole: Path, tmp_path: Path) -> None:
    """Nothing is trained in between, so all state must be written as it was read."""
    ends = {}
    for ranks, source in ((1, whole), (2, tmp_path / "1")):
        folder = tmp_path / str(ranks)
        shutil.copytree(source / "checkpoints/step-00000006", folder / "checkpoints/step-00000006")
        job(folder)
        ends[ranks] = run_distributed(resave, ranks, folder)[0]
    first = load_state(whole / "checkpoints/step-00000006")
    for ranks in (1, 2):
        state = load_state(tmp_path / str(ranks) / "checkpoints/step-00000006")
        assert state.keys() == first.keys()
        for name, tensor in first.items():
            size = min(len(tensor), len(state[name]))
            assert (tensor[:size] == state[name][:size]).all(), name
            assert not tensor[size:].any()  # filling
            assert not state[name][size:].any()
    assert ends[1] == ends[2]


def seen_after_a_slow_rename(folder: Path) -> list[str]:
    """Settle a checkpoint whose rename takes rank 0 a second, then finish; return what each rank sees."""
    import torch.distributed as dist

    from magicdrive_core.training.checkpoints import Saver, TrainingProgress, WriteStatus
    from magicdrive_core.training.state import Ema
    from tests.training.networks import engine_of, tiny_network, training

    engine = engine_of(tiny_network(), training())
    publish = Saver._publish

    def slowly(saver: Saver, failed: list[int]) -> None:
        time.sleep(1)
        publish(saver, failed)

    with (
        mock.patch.object(Saver, "_publish", slowly),
        Saver(folder / "checkpoints", engine, Ema(engine, 0.9), 2, None) as saver,
    ):
        saver.start(TrainingProgress(step=1))
        while saver.status == WriteStatus.BUSY:
            time.sleep(0.01)
        dist.barrier()
        saver.settle([WriteStatus.DONE] * dist.get_world_size())
        saver.finish()
        return names(folder)


def test_finishing_waits_for_the_rename_of_the_last_checkpoint(tmp_path: Path) -> None:
    assert run_distributed(seen_after_a_slow_rename, 2, tmp_path) == [["step-00000001"]] * 2


def resave(folder: Path) -> dict[str, Any]:

    from magicdrive_core.training import checkpoints as checkpoint
    from magicdrive_core.training.checkpoints import Saver
    from magicdrive_core.training.state import Ema
    from tests.training.networks import TinyNetwork, engine_of, training

    engine = engine_of(TinyNetwork(), training())
    ema = Ema(engine, 0.9)
    progress = checkpoint.resume(folder / "checkpoints", engine, ema)
    assert progress is not None
    with Saver(folder / "checkpoints", engine, ema, 2, None) as saver:
        saver.start(progress)
        saver.finish()
    return {name: tensor.tolist() for name, tensor in engine.network.state_dict().items()}


def listed(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Change the list of files in a checkpoint's manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def forged(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's state, and its digest with it."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    listed(path, lambda manifest: manifest.update({"state.json": sha256_file(path / "state.json")}))


def one_more_shard(path: Path, name: str, *, with_digest: bool) -> None:
    shutil.copy(path / "shard-00000-of-00002.safetensors", path / name)
    if with_digest:
        listed(path, lambda manifest: manifest.update({name: sha256_file(path / name)}))


def in_its_place(path: Path, create: Callable[[Path], Any]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    create(path)


FIRST = "shard-00000-of-00002.safetensors"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "manifest {}": lambda path: (path / "manifest.json").write_text("{}"),
    "manifest []": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest null": lambda path: (path / "manifest.json").write_text("null"),
    "manifest a number": lambda path: (path / "manifest.json").write_text("7"),
    "manifest a text": lambda path: (path / "manifest.json").write_text('"step"'),
    "manifest without digests": lambda path: listed(path, lambda m: m.update(dict.fromkeys(m))),
    "manifest empty": lambda path: (path / "manifest.json").write_bytes(b""),
    "manifest of NUL": lambda path: (path / "manifest.json").write_bytes(bytes(100)),
    "manifest too deep": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "manifest a number too long": lambda path: (path / "manifest.json").write_text("1" * 10_000),
    "manifest a folder": lambda path: in_its_place(path / "manifest.json", Path.mkdir),
    "manifest a pipe": lambda path: in_its_place(path / "manifest.json", os.mkfifo),
    "one entry": lambda path: (path / "manifest.json").write_text(
        json.dumps({"state.json": sha256_file(path / "state.json")})
    ),
    "a shard not listed": lambda path: listed(path, lambda manifest: manifest.pop(FIRST)),
    "an extra shard": lambda path: one_more_shard(path, "shard-00002-of-00003.safetensors", with_digest=False),
    "an extra shard with its digest": lambda path: one_more_shard(
        path, "shard-00002-of-00002.safetensors", with_digest=True
    ),
    "a file of elsewhere": lambda path: listed(path, lambda manifest: manifest.update({"../../run.json": "0" * 64})),
    "a shard a pipe": lambda path: in_its_place(path / FIRST, os.mkfifo),
    "a shard a folder": lambda path: in_its_place(path / FIRST, Path.mkdir),
    "no folder but a file": lambda path: in_its_place(path, lambda it: it.write_text("{}")),
    "no folder but a pipe": lambda path: in_its_place(path, os.mkfifo),
    "an empty folder": lambda path: in_its_place(path, Path.mkdir),
    "of another step": lambda path: forged(path, lambda state: state["progress"].update(step=5)),
    "of other ranks": lambda path: forged(path, lambda state: state.update(ranks=3)),
    "state {}": lambda path: forged(path, dict.clear),
    "state of a wrong type": lambda path: forged(path, lambda state: state.update(moment_steps=[1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_wrong_with_a_checkpoint_the_sound_one_before_it_is_used(
    whole: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000006"
    assert not caplog.records
    DAMAGES[damage](tmp_path / "checkpoints/step-00000006")
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000003"
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint {tmp_path}/checkpoints/step-00000006 is damaged (")


def test_other_names_are_no_checkpoints_and_stay(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", folder)
    others = ["step-00000006.bak", "step-final", "step-00000009 (copy)", "step-", "step-9", ".step-note"]
    for name in others:
        shutil.copytree(folder / "step-00000003", folder / name)
    assert newest(folder) == folder / "step-00000006"
    assert [step_of(path) for path in checkpoints(folder)] == [3, 6]
    job(tmp_path, checkpoint_every=1, keep_checkpoints=1)
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert set(names(tmp_path)) == {"step-00000007", *others}


def test_damaged_checkpoints_of_later_steps_do_not_push_out_sound_ones(whole: Path, tmp_path: Path) -> None:
    """Two are kept, and two damaged ones lie ahead: the one that is saved must remain."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints/step-00000003", folder / "step-00000003")
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    for name in ("step-00000008", "step-00000009"):
        (folder / name).mkdir()
    job(tmp_path, keep_checkpoints=2)
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000008", "step-00000009"]
    assert newest(folder) == folder / "step-00000006"
    assert_equal_ends(tmp_path, whole)


def load_state(path: Path) -> dict[str, Any]:
    """Read every flat tensor, joined from the ranks' files."""
    import torch

    parts = [load_file(file) for file in sorted(path.glob("shard-*"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train_until_the_writer_dies(folder: Path, rank: int, step: int) -> None:
    """Train; kill this rank when its thread has written its part, before any rank can know."""
    import torch.distributed as dist

    from magicdrive_core.training import checkpoints as saving

    real = saving.save_file

    def write(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if dist.get_rank() == rank and f"{step:08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(saving, "save_file", write):
        train_once(folder)


def test_a_checkpoint_of_a_killed_writer_is_not_used(whole: Path, tmp_path: Path) -> None:
    job(tmp_path)
    with pytest.raises(RankError):
        run_distributed(train_until_the_writer_dies, 2, tmp_path, 0, 6)
    assert names(tmp_path) == [".step-00000006.partial", "step-00000003"]
    assert run_distributed(train_once, 2, tmp_path) == [0, 0]
    assert_equal_ends(tmp_path, whole)
