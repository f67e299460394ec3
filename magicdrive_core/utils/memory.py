"""Memory that this process may use: the tightest limit of its container (cgroup 1 or 2) and of the machine.

``keep_freed`` sets how the process treats memory that it has freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# Options of mallopt in glibc's malloc.h, and the size above which a freed block goes back to the kernel.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _KEPT_BELOW = -1, -3, 1 << 30
_UNLIMITED = 1 << 60  # without a limit, cgroup 1 writes the largest multiple of a page


def memory_limit(root: Path = ROOT) -> int:
    """Returns the bytes that all processes of the container together may hold.

    Args:
        root: folder that holds ``proc`` and ``sys``; tests pass a folder of their files.

    Returns:
        The lowest limit in bytes: that of the machine's memory, or of a control group of this process.
    """
    return min([_machine(root, "MemTotal"), *(limit for limit, _ in _groups(root))])


def memory_left(root: Path = ROOT) -> int:
    """Returns the bytes left until a limit is reached. File pages that the kernel can drop count as left.

    Args:
        root: folder that holds ``proc`` and ``sys``; tests pass a folder of their files.

    Returns:
        The least number of bytes left under any limit, at least 0.
    """
    return max(0, min([_machine(root, "MemAvailable"), *(limit - used for limit, used in _groups(root))]))


def resident(root: Path = ROOT) -> int:
    """Returns the bytes of physical memory that this process holds.

    Args:
        root: folder that holds ``proc``; tests pass a folder of their files.

    Returns:
        Bytes, ``VmRSS`` of the kernel: shared pages are included.
    """
    return _kilobytes(root / "proc/self/status", "VmRSS")


def keep_freed() -> None:
    """Makes this process keep freed memory for its next tensors.

    glibc hands each freed block of some MB back to the kernel, which fills it with zeros before the next tensor can
    use it: a quarter of the CPU time of encoding clips (benchmarks/results/data.md). Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT_BELOW)
        mallopt(_MMAP_THRESHOLD, _KEPT_BELOW)


def _machine(root: Path, field: str) -> int:
    return _kilobytes(root / "proc/meminfo", field)


def _kilobytes(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} has no {field}")


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yields (limit, bytes used) of every control group of this process that has a limit, outer groups too."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        second = not controllers
        if not second and "memory" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup" if second else "sys/fs/cgroup/memory")
        limit_file, used_file = (
            ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        cached = "inactive_file" if second else "total_inactive_file"
        group = base / path.lstrip("/")
        # Inside a container the path may be that on the host: then the mount itself is the container's group.
        for folder in [folder for folder in (group, *group.parents) if folder == base or base in folder.parents]:
            limit = _number(folder / limit_file)
            if limit is None or limit >= _UNLIMITED:
                continue
            used = (_number(folder / used_file) or 0) - _cached(folder / "memory.stat", cached)
            yield limit, max(0, used)


def _number(path: Path) -> int | None:
    """Reads the number in a file; None if the file is missing or says max."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(path: Path, field: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == field), 0)
