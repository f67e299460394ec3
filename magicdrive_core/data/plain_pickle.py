"""A safe unpickler: it reads numbers, texts, containers and NumPy arrays, and refuses any other type before running it.

A pickle is a program, and an ordinary unpickler runs whatever its author wants. This one only builds plain values.
NumPy trusts the states of its own types, and a hostile one makes it follow pointers from the file. So arrays are built
here, from checked parts: a data type of a list of names, a shape, and exactly the bytes that both ask for.
"""

from __future__ import annotations

import math
import pickle
import re
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.utils.files import check_regular

_TYPE_NAMES = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[US][0-9]{1,6}|O8?")
# A value may take 64 times its bytes in the file (an empty dict); a few bytes can ask for any amount.
_GROWTH, _SPARE = 64, 1 << 30


class _Type:
    """A data type of NumPy, from the arguments of ``numpy.dtype`` and its state in a pickle.

    Args:
        name: its name, such as "f8".
        _flags: two flags of ``numpy.dtype``, which change nothing here.
    """

    def __init__(self, name: str, *_flags: object) -> None:
        if isinstance(name, bytes):
            name = name.decode("latin1")
        if not isinstance(name, str) or not _TYPE_NAMES.fullmatch(name):
            raise pickle.UnpicklingError(f"an array of the type {name!r}")
        self.type = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        """Set the byte order, the only part of the state that plain types have.

        Args:
            state: the state in the pickle.

        Raises:
            UnpicklingError: it describes more than a byte order.
        """
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array with fields or parts")
        if order in ("<", ">"):
            self.type = np.dtype(f"{order}{self.type.str[1:]}")


class _Array(np.ndarray):
    """An array whose state in a pickle is checked before NumPy takes it."""

    def __setstate__(self, state: Any) -> None:
        """Fill the array.

        Args:
            state: version, shape, data type, whether it is in Fortran order, and its bytes or list of objects.

        Raises:
            UnpicklingError: the parts do not fit each other.
        """
        _, shape, kind, fortran, data = state
        count = _count(shape, kind)
        if isinstance(data, str):
            data = data.encode("latin1")
        if kind.type.hasobject:
            fits = type(data) is list and len(data) == count
        else:
            fits = type(data) is bytes and len(data) == count * kind.type.itemsize
        if not fits:
            raise pickle.UnpicklingError(f"an array of shape {shape} without its {count} values")
        super().__setstate__((1, shape, kind.type, bool(fortran), data))


_ARRAY = object()  # stands for the type numpy.ndarray, which is named but must not be called


def _reconstruct(kind: Any, _shape: Any, _code: Any) -> _Array:
    """Replace NumPy's function: an empty array, whose state follows."""
    if kind is not _ARRAY:
        raise pickle.UnpicklingError("an array of another kind")
    return _Array((0,), np.uint8)


def _scalar(kind: Any, data: Any) -> Any:
    """Replace NumPy's function: a number or text of a data type, from its bytes."""
    if isinstance(data, str):
        data = data.encode("latin1")
    if type(data) is not bytes or not isinstance(kind, _Type) or kind.type.hasobject:
        raise pickle.UnpicklingError("a number without its bytes")
    if len(data) != kind.type.itemsize:
        raise pickle.UnpicklingError("a number with too few or too many bytes")
    return np.frombuffer(data, kind.type)[0] if data else kind.type.type()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> Any:
    """Replace NumPy's function: an array from its bytes (protocol 5)."""
    count = _count(shape, kind)
    if kind.type.hasobject or type(data) not in (bytes, bytearray) or len(data) != count * kind.type.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {shape} without its {count} values")
    return np.frombuffer(data, kind.type).reshape(shape, order="F" if order == "F" else "C")


def _count(shape: Any, kind: Any) -> int:
    """Return the number of values of a shape, which must be one."""
    if not isinstance(kind, _Type) or type(shape) is not tuple or len(shape) > 8:
        raise pickle.UnpicklingError("an array without shape or type")
    if not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        raise pickle.UnpicklingError(f"an array of shape {shape}")
    return math.prod(shape)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Replace ``_codecs.encode``, which pickles of protocol 2 build bytes with; only Latin-1 is allowed."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1") or type(text) is not str:
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: str = "latin1") -> bytearray:
    """Replace ``bytearray``, which makes as many zeros as a number asks for."""
    if type(data) not in (bytes, str):
        raise pickle.UnpicklingError("a bytearray without its bytes")
    return bytearray(data if type(data) is bytes else _bytes(data, encoding))


_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")  # __builtin__ up to protocol 2
        for name, kind in (("set", set), ("frozenset", frozenset), ("complex", complex), ("bytearray", _bytearray))
    },
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _Type,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")  # NumPy 1 and NumPy 2
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
_BROKEN = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError),
    *(MemoryError, OverflowError, RecursionError),
)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look up a type that the pickle asks for, called by the base class.

        Args:
            module: module of the type.
            name: name of the type.

        Returns:
            The type or function of ``_ALLOWED``.

        Raises:
            _NotPlainError: the type is not in ``_ALLOWED``.
        """
        if (module, name) not in _ALLOWED:
            raise _NotPlainError(f"{module}.{name}")
        return _ALLOWED[module, name]


class _NotPlainError(Exception):
    """The pickle asks for a type that is not in ``_ALLOWED``."""


def read_plain_pickle(path: Path | str) -> Any:
    """Read a pickle file of plain data.

    Args:
        path: the file; it may come from anyone.

    Returns:
        The decoded value: numbers, texts, containers and NumPy arrays.

    Raises:
        MagicDriveError: the file is missing, broken, or not plain data; the message names the type that it asks for,
            which was not run.
    """
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file, _limited_memory(path.stat().st_size):
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing") from None
    except _NotPlainError as error:
        raise MagicDriveError(
            f"{path} is refused: it asks for {error}, which is not a plain data type",
            "nothing in it was run; ask its author",
        ) from None
    except OSError as error:
        raise MagicDriveError(f"{path} cannot be read: {error.strerror}") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MagicDriveError(f"{path} is not a complete pickle: {reason}", "download the file again") from None


@contextmanager
def _limited_memory(size: int) -> Iterator[None]:
    """Limit this process's memory while a file of ``size`` bytes is read; more raises MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (now + _GROWTH * size + _SPARE, soft) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
