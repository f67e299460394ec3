"""A safe unpickler: it reads numbers, texts, containers and NumPy arrays, and refuses any other type before running it.

A pickle is a program, and an ordinary unpickler runs whatever its author wants. This one only builds the types below.
"""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from magicdrive_core.errors import MagicDriveError


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Replace ``_codecs.encode``, which pickles of protocol 2 build bytes with; only Latin-1 is allowed."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")  # __builtin__ up to protocol 2
        for kind in (set, frozenset, bytearray, complex)
    },
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): getattr(importlib.import_module(f"numpy.core.{module}"), name)
        for core in ("core", "_core")  # NumPy 1 and NumPy 2
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
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
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing") from None
    except _NotPlainError as error:
        raise MagicDriveError(
            f"{path} is refused: it asks for {error}, which is not a plain data type",
            "nothing in it was run; ask its author",
        ) from None
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MagicDriveError(f"{path} is not a complete pickle: {reason}", "download the file again") from None
