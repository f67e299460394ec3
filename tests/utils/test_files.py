"""Writes are all or nothing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import (
    atomic_file,
    atomic_folder,
    read_json,
    resumable_folder,
    sha256_file,
    sha256_folder,
    write_json,
)


class InterruptedWriteError(Exception):
    pass


def test_interrupted_file_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def write_half() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise InterruptedWriteError

    with pytest.raises(InterruptedWriteError):
        write_half()
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_folder_keeps_the_old_content(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with atomic_folder(folder) as partial:
        (partial / "one").write_text("1")

    def write_half() -> None:
        with atomic_folder(folder) as partial:
            (partial / "two").write_text("2")
            raise InterruptedWriteError

    with pytest.raises(InterruptedWriteError):
        write_half()
    assert [file.name for file in folder.iterdir()] == ["one"]
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for name in ("old", "new"):
        with atomic_folder(folder) as partial:
            (partial / name).write_text(name)
    assert [file.name for file in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_full_disk_is_explained(tmp_path: Path) -> None:
    def write_on_full_disk() -> None:
        with atomic_file(tmp_path / "big"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MagicDriveError, match="no space left on the disk"):
        write_on_full_disk()
    assert not list(tmp_path.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The nearest thing to a full disk that needs no rights: the system refuses to write on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NUMBERS = np.random.default_rng(0).random(10_000)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(NUMBERS.tobytes()),
        lambda path: save_file({"numbers": NUMBERS}, path),
        lambda path: pq.write_table(pa.table({"numbers": NUMBERS}), path),
    ],
    ids=["python", "safetensors", "parquet"],
)
def test_every_library_s_full_disk_is_explained(tmp_path: Path, write: Callable[[Path], None]) -> None:
    def write_too_much() -> None:
        with files_of_at_most(4096), atomic_file(tmp_path / "big") as partial:
            write(partial)

    with pytest.raises(MagicDriveError, match=r"no space left on the disk of .*big: File too large"):
        write_too_much()
    assert not list(tmp_path.iterdir())


def test_json_faults_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(MagicDriveError, match=r"gone.json is missing \(run dvc repro\)"):
        read_json(tmp_path / "gone.json", hint="run dvc repro")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(MagicDriveError, match="not valid JSON"):
        read_json(tmp_path / "half.json")


def test_folder_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = sha256_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = sha256_folder(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, sha256_folder(tmp_path)}) == 3


def test_an_interrupted_resumable_folder_is_found_again_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "cache"

    def interrupted(key: str, name: str) -> None:
        with resumable_folder(path, key) as folder:
            found = sorted(file.name for file in folder.iterdir())
            write_json(folder / f"{name}.json", name)
            (folder / f".{name}.0.partial.json").touch()  # half a file
            raise InterruptedWriteError(found)

    def found(key: str, name: str) -> list[str]:
        with pytest.raises(InterruptedWriteError) as error:
            interrupted(key, name)
        return list(error.value.args[0])

    assert found("one", "a") == []
    assert found("one", "b") == ["a.json"]
    assert found("two", "c") == []  # another key starts anew, and what the first one left is gone
    assert found("one", "d") == []
    assert not path.exists()
    with resumable_folder(path, "one") as folder:
        assert sorted(file.name for file in folder.iterdir()) == ["d.json"]
    assert [file.name for file in path.iterdir()] == ["d.json"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[" * 100_000, b"1" * 10_000, b"\xff\xfe", b'{"a": 1'])
def test_any_bytes_that_are_no_json_are_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(MagicDriveError, match=r"bad\.json is not valid JSON: "):
        read_json(tmp_path / "bad.json")


@pytest.mark.parametrize("read", [read_json, sha256_file])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MagicDriveError, match="pipe is not a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(MagicDriveError, match=r"/dev/zero is not a regular file"):
        read(Path("/dev/zero"))
