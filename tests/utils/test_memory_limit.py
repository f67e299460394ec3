"""The memory that a process may use, by the files of cgroup 1, cgroup 2 and neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicdrive_core.utils.memory import memory_left, memory_limit, resident

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {40 * GIB // 1024} kB\n")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_without_limits_the_machine_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/user.slice\n")
    write(root, "sys/fs/cgroup/user.slice/memory.max", "max\n")
    assert memory_limit(root) == 64 * GIB
    assert memory_left(root) == 40 * GIB


def test_the_tightest_group_counts_and_cached_files_are_free(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/pod/container\n")
    write(root, "sys/fs/cgroup/pod/memory.max", f"{8 * GIB}\n")
    write(root, "sys/fs/cgroup/pod/memory.current", f"{7 * GIB}\n")
    write(root, "sys/fs/cgroup/pod/memory.stat", f"anon 5\ninactive_file {4 * GIB}\n")
    write(root, "sys/fs/cgroup/pod/container/memory.max", f"{16 * GIB}\n")
    write(root, "sys/fs/cgroup/pod/container/memory.current", f"{GIB}\n")
    assert memory_limit(root) == 8 * GIB
    assert memory_left(root) == 5 * GIB


def test_inside_a_container_the_mount_is_the_group(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/docker/0123\n")  # a path of the host, not to be seen here
    write(root, "sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
    assert memory_limit(root) == 2 * GIB
    assert memory_left(root) == 0


def test_cgroup_1(root: Path) -> None:
    write(root, "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/job\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    write(root, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(4 * GIB))
    write(root, "sys/fs/cgroup/memory/job/memory.usage_in_bytes", str(3 * GIB))
    write(root, "sys/fs/cgroup/memory/job/memory.stat", f"total_inactive_file {GIB}\n")
    assert memory_limit(root) == 4 * GIB
    assert memory_left(root) == 2 * GIB


def test_this_process_is_below_the_limit() -> None:
    assert 0 < resident() < memory_limit()
    assert memory_left() <= memory_limit()
