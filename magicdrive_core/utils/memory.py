"""How much memory this process may use: the tightest limit of its container (cgroup 1 or 2) and of the machine.

And how it deals with what it has freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
# Options of mallopt in glibc's malloc.h, and the block from which on memory goes back to the kernel when it is freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _KEPT_BELOW = -1, -3, 1 << 30
_UNLIMITED = 1 << 60  # cgroup 1 writes the largest multiple of a page where there is no limit


def memory_limit(root: Path = ROOT) -> int:
    """Bytes that all processes of the container may hold together."""
    return min([_machine(root, "MemTotal"), *(limit for limit, _ in _groups(root))])


def memory_left(root: Path = ROOT) -> int:
    """Bytes that are left until a limit is reached. File pages that the kernel can drop count as left."""
    return max(0, min([_machine(root, "MemAvailable"), *(limit - used for limit, used in _groups(root))]))


def resident(root: Path = ROOT) -> int:
    """Bytes of physical memory that this process holds."""
    return _kilobytes(root / "proc/self/status", "VmRSS")


def keep_freed() -> None:
    """Lets this process keep memory that it frees, for its next tensors.

    glibc hands each freed block of some MB back to the kernel, which has to fill it with zeros again before the next
    tensor lies there: encoding a scene's clips spent a quarter of its CPU time on that. Other C libraries
    are left as they are.
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
    """(limit, bytes used) of every control group around this process that has a limit, the outer ones too."""
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
        # Inside a container the path may be that of the host: then the mount itself is the container's group.
        for folder in [folder for folder in (group, *group.parents) if folder == base or base in folder.parents]:
            limit = _number(folder / limit_file)
            if limit is None or limit >= _UNLIMITED:
                continue
            used = (_number(folder / used_file) or 0) - _cached(folder / "memory.stat", cached)
            yield limit, max(0, used)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file or the word max."""
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
