"""The C++ of this folder, compiled for this machine's processor at its first use and kept for later runs.

Where there is no GCC, or it fails, torch's own kernels do the same, slower; the log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import atomic_file

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("attention.cpp", "linear.cpp", "pointwise.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")  # torch has the same OpenMP loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        logger.info("no C++ compiler: attention and norms on a CPU take torch's kernels, which are slower")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip() or str(error)).splitlines()[0]
        logger.warning("%s cannot compile %s, torch's slower kernels are used: %s", compiler, FOLDER, why)
    except (OSError, MagicDriveError) as error:
        logger.warning("the kernels of %s cannot be used, torch's slower ones are: %s", FOLDER, error)
    return None


def usable(x: Tensor) -> bool:
    """Whether the kernels serve ``x``."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and _compiles()


@torch.compiler.assume_constant_result
def _compiles() -> bool:
    return library() is not None


def _compiled(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    digest = hashlib.sha256(b"\0".join([version.encode(), repr(FLAGS).encode(), *_processor()]))
    for file in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magicdrive"
    path = cache / f"kernels-{digest.hexdigest()[:16]}.so"
    if not path.is_file():
        with atomic_file(path) as partial:  # several processes may do so at a time
            command = [compiler, *FLAGS, *(str(FOLDER / name) for name in SOURCES), "-o", str(partial)]
            subprocess.run(command, capture_output=True, check=True, text=True)
    return path


def _processor() -> Iterator[bytes]:
    """What tells processors apart for which the compiler may choose other instructions (Linux)."""
    for line in Path("/proc/cpuinfo").read_bytes().splitlines():
        if not line:  # of the first one
            return
        if line.split(b"\t")[0] in (b"flags", b"Features", b"model", b"model name", b"CPU part"):
            yield line
