"""Pickles that hold data and nothing else: numbers, texts, containers, NumPy arrays. Anything else is refused unread.

A pickle is a program: an ordinary unpickler runs whatever its author wants. This one can only build the types below.
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
    """What pickles of protocol 2 make bytes with; Latin-1 alone, other codecs are code."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")  # the latter up to protocol 2
        for kind in (set, frozenset, bytearray, complex)
    },
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): getattr(importlib.import_module(f"numpy.core.{module}"), name)
        for core in ("core", "_core")  # of NumPy 1 and 2
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}
_BROKEN = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError),
    *(MemoryError, OverflowError, RecursionError),
)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _NotPlainError(f"{module}.{name}")
        return _ALLOWED[module, name]


class _NotPlainError(Exception):
    """The pickle asks for something that is no data type."""


def read_plain_pickle(path: Path | str) -> Any:
    """What a pickle file holds.

    Raises:
        MagicDriveError: missing, broken, or not plain data (what it asked for is named, and was not run).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing") from None
    except _NotPlainError as error:
        raise MagicDriveError(
            f"{path} is refused: it asks for {error}, which is no data type", "nothing in it was run; ask its author"
        ) from None
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MagicDriveError(f"{path} is not a whole pickle: {reason}", "fetch the file again") from None
