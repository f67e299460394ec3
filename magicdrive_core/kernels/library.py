"""The C++ kernels as a library: compiled for this machine's processor at first use, kept for later runs, and called.

A kept library is loaded only if nobody else can have written it and its bytes have the digest in its name.

Where there is no GCC, or it fails, torch's own kernels compute the same, slower; the log says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import private_folder, sha256_file

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("attention.cpp", "linear.cpp", "pointwise.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")  # torch has the same OpenMP loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compiles and loads the kernels, once a process.

    Returns:
        The loaded library; None where there is no compiler, or where it or the library fails (the log says why).
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        logger.info("no C++ compiler: torch's slower kernels are used; install g++ for the faster ones")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip() or str(error)).splitlines()[0]
        logger.warning("%s cannot compile %s; torch's slower kernels are used: %s", compiler, FOLDER, why)
    except (OSError, MagicDriveError) as error:
        logger.warning("the kernels of %s cannot be used; torch's slower kernels are used: %s", FOLDER, error)
    return None


def usable(x: Tensor) -> bool:
    """Tells whether the kernels serve tensors of the device and dtype of ``x``.

    Args:
        x: any tensor of the computation.

    Returns:
        True for fp32 on a CPU, where the kernels compile.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and _compiles()


@torch.compiler.assume_constant_result
def _compiles() -> bool:
    return library() is not None


def _compiled(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    digest = hashlib.sha256(b"\0".join([version.encode(), repr(FLAGS).encode(), *_processor()]))
    for file in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        digest.update(file.read_bytes())
    cache, name = _cache_folder(), f"kernels-{digest.hexdigest()[:16]}"
    private_folder(cache)
    for path in cache.glob(f"{name}-*.so"):
        if _is_intact(path):
            return path
    with TemporaryDirectory(dir=cache, prefix=".") as folder:  # several processes may compile at a time
        built = Path(folder) / "kernels.so"
        command = [compiler, *FLAGS, *(str(FOLDER / name) for name in SOURCES), "-o", str(built)]
        subprocess.run(command, capture_output=True, check=True, text=True)
        built.chmod(0o700)
        return built.replace(cache / f"{name}-{sha256_file(built)}.so")


def _cache_folder() -> Path:
    """Returns the folder for compiled kernels below the user's cache folder, also where HOME is empty or missing.

    Raises:
        MagicDriveError: this user has no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # to be ignored then, says the XDG specification
        try:
            cache = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir) / ".cache"
        except KeyError:
            raise MagicDriveError("this user has no home folder for them", "set XDG_CACHE_HOME") from None
    return cache / "magicdrive"


def _is_intact(path: Path) -> bool:
    """Whether only this user can have written a kept library, and it is whole."""
    found = path.lstat()
    own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return own and path.stem.rsplit("-", 1)[1] == sha256_file(path)


def _processor() -> Iterator[bytes]:
    """Lines that distinguish processors for which the compiler may choose other instructions (Linux)."""
    for line in Path("/proc/cpuinfo").read_bytes().splitlines():
        if not line:  # the first processor ends here
            return
        if line.split(b"\t")[0] in (b"flags", b"Features", b"model", b"model name", b"CPU part"):
            yield line


# Calls: tensors become addresses and strides.

_LONG, _FLOATS = ctypes.c_int64, ctypes.c_void_p
MULTIPLY_ADDS = 32  # take as long as one number that is read and written
WORK = 1 << 15  # numbers for a thread, at least, as torch's kernels have it
WIDTHS = 16  # sizes of linear maps are multiples of it: no processor has longer vectors of floats


class _Heads(ctypes.Structure):
    _fields_ = (("data", _FLOATS), *((name, _LONG) for name in ("outer", "inner", "token", "head")))

    @classmethod
    def of(cls, x: Tensor) -> _Heads:
        if x.numel() and x.stride(4) != 1:
            raise ValueError("the channels of a head must be adjacent in memory")
        return cls(x.data_ptr(), *x.stride()[:4])


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _LONG) for name in ("outer", "inner", "queries", "keys", "heads", "d")),
        *((name, _Heads) for name in ("q", "k", "v")),
        *((name, _FLOATS) for name in ("q_norm", "k_norm", "angles", "bias")),
    )


class Attention:
    """Computes softmax(q k' / sqrt(d) + bias) v for q (outer, inner, n, h, d), k and v (outer, inner, m, h, d), fp32.

    Args:
        q: (outer, inner, n, h, d), of any strides, but the channels of a head are adjacent.
        k: (outer, inner, m, h, d), of such strides.
        v: (outer, inner, m, h, d), of such strides.
        norm: (2, d), weights of RMS norms of q and k; None: neither has one.
        angles: (n, d / 2, 2), cosines and sines that turn the channel pairs of q and k after the norm; None: none.
        bias: (outer * inner, m), added to the scores of every query; None: nothing is added.

    Raises:
        ValueError: there are no keys, or a head's channels are not adjacent in memory.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm: Tensor | None = None,
        angles: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        norm, angles, bias = (None if given is None else given.contiguous() for given in (norm, angles, bias))
        self._held = q, k, v, norm, angles, bias  # alive as long as their addresses are used
        outer, inner, queries, heads, d = q.shape
        if not k.shape[2]:
            raise ValueError("attention needs at least one key")
        norms = (None, None) if norm is None else (norm.data_ptr(), norm.data_ptr() + d * norm.element_size())
        others = (None if given is None else given.data_ptr() for given in (angles, bias))
        sizes = outer, inner, queries, k.shape[2], heads, d
        self._given = _Attention(*sizes, *map(_Heads.of, (q, k, v)), *norms, *others)
        self._work = prod(sizes) // MULTIPLY_ADDS

    def forward(self, out: Tensor, *, add: bool = False) -> None:
        """Computes the attention.

        Args:
            out: (outer, inner, n, h, d), receives the result.
            add: whether the result is added to ``out`` instead of written.
        """
        _call("attention", self._work, ctypes.byref(self._given), _Heads.of(out), int(add))

    def backward(
        self, gradient: Tensor, at: tuple[Tensor, Tensor, Tensor], norms: Tensor | None, add: tuple[bool, bool]
    ) -> None:
        """Computes the gradients at q, k and v from the one at the output.

        Args:
            gradient: (outer, inner, n, h, d), gradient at the output.
            at: receives the gradients at q, k and v, each of the tensor's shape.
            norms: from ``new_norms``; the gradients at the norms are added to it. None: there are no norms.
            add: whether to add at q, and at k and v, instead of writing.
        """
        targets = (_Heads.of(each) for each in at)
        norms_at = None if norms is None else _floats(norms)
        flags = (int(each) for each in add)
        _call(
            "attention_backward", self._work, ctypes.byref(self._given), _Heads.of(gradient), *targets, norms_at, *flags
        )


def new_norms(norm: Tensor) -> Tensor:
    """Allocates zeros for the gradient at the norms: each thread adds to its own part.

    Args:
        norm: (2, d), weights of the norms.

    Returns:
        (threads, 2, d); the sum over the threads is the gradient at ``norm``.
    """
    return norm.new_zeros(torch.get_num_threads(), *norm.shape)


class _Weights(ctypes.Structure):
    _fields_ = (("weight", _FLOATS), ("bias", _FLOATS), ("inputs", _LONG), ("outputs", _LONG))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> _Weights:
        return cls(weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.shape[1], weight.shape[0])


class _Modulation(ctypes.Structure):
    _fields_ = (
        ("shift", _FLOATS),
        ("scale", _FLOATS),
        *((name, _LONG) for name in ("period", "inner", "repeat", "count")),
    )


class Modulation:
    """LN(x) * (1 + scale) + shift of contiguous rows.

    ``period`` rows in a row share one shift and scale; ``inner`` of these follow each other, and their rows come
    ``repeat`` times before the next ``inner`` ones are taken. After the last one the first follows.

    Args:
        shift: (count, C), contiguous.
        scale: shaped like ``shift``, contiguous.
        period: consecutive rows that share one shift and scale.
        inner: shifts and scales that follow each other before they come again.
        repeat: times that these come before the next ones.
    """

    def __init__(self, shift: Tensor, scale: Tensor, period: int, inner: int, repeat: int) -> None:
        self._held = shift, scale  # alive as long as their addresses are used
        self._given = _Modulation(shift.data_ptr(), scale.data_ptr(), period, inner, repeat, len(shift))

    def forward(self, x: Tensor, out: Tensor) -> None:
        """Modulates rows.

        Args:
            x: (R, C), contiguous.
            out: (R, C), contiguous, receives the result.
        """
        _call(
            "modulate", x.numel(), _floats(x), _LONG(len(x)), _LONG(x.shape[1]), ctypes.byref(self._given), _floats(out)
        )

    def backward(self, gradient: Tensor, x: Tensor, at_x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the gradients at x, shift and scale.

        Args:
            gradient: (R, C), contiguous, gradient at the result of ``forward``.
            x: (R, C), contiguous, the argument of ``forward``.
            at_x: (R, C), contiguous, receives the gradient at ``x``.

        Returns:
            The gradients at shift and scale, (count, C) each.
        """
        sums = x.new_zeros(torch.get_num_threads(), *self._held[0].shape[:1], 2, x.shape[1])
        sizes = _LONG(len(x)), _LONG(x.shape[1])
        given = ctypes.byref(self._given)
        _call(
            "modulate_backward", x.numel(), _floats(gradient), _floats(x), *sizes, given, _floats(at_x), _floats(sums)
        )
        return sums[:, :, 0].sum(0), sums[:, :, 1].sum(0)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Computes Linear(x modulated).

        Args:
            x: (R, C), contiguous.
            weight: (D, C), contiguous, both sizes in multiples of ``WIDTHS``.
            bias: (D); None: the map has none.
            out: (R, D), contiguous, receives the result.
        """
        weights = ctypes.byref(_Weights.of(weight, bias))
        work = len(x) * weight.numel() // MULTIPLY_ADDS
        _call("linear", work, _floats(x), _LONG(len(x)), weights, ctypes.byref(self._given), _floats(out))

    def mlp(
        self, x: Tensor, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], hidden: Tensor | None, out: Tensor
    ) -> None:
        """Computes Linear(GELU(Linear(x modulated))), GELU in its tanh form; all tensors are contiguous.

        Args:
            x: (R, C).
            up: weight (D, C) and bias (D), both sizes in multiples of ``WIDTHS``.
            down: weight (C, D) and bias (C).
            hidden: (R, D), receives GELU's input; None: it is not kept.
            out: (R, C), receives the result.
        """
        maps = (ctypes.byref(_Weights.of(*each)) for each in (up, down))
        kept = None if hidden is None else _floats(hidden)
        work = len(x) * up[0].numel() // MULTIPLY_ADDS
        _call("mlp", work, _floats(x), _LONG(len(x)), *maps, ctypes.byref(self._given), kept, _floats(out))


def gelu_backward(x: Tensor, gradient: Tensor, value: Tensor) -> None:
    """Computes GELU and its gradient, in the tanh form; all tensors are contiguous and of one shape.

    Args:
        x: GELU's input.
        gradient: gradient at GELU's output; the gradient at ``x`` is written over it.
        value: receives GELU(x).
    """
    _call("gelu_backward", x.numel(), _floats(x), _floats(gradient), _LONG(x.numel()), _floats(value))


def _floats(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _call(name: str, work: int, *arguments: object) -> None:
    """Calls a kernel with as many threads as ``work``, in numbers that are read and written, is worth."""
    functions = library()
    assert functions is not None, "the callers ask before"
    threads = max(1, min(torch.get_num_threads(), work // WORK))
    getattr(functions, name)(*arguments, ctypes.c_int(threads))
