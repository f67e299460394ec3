"""Writes files and folders atomically: under a temporary name, synced, then renamed. Reads JSON, takes digests."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from magicdrive_core.errors import MagicDriveError, system_error


@contextmanager
def atomic_file(path: Path | str, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on a clean exit it is synced and renamed to ``path``.

    At every moment, ``path`` holds either its old content or the complete new content. If the block raises, the
    temporary file is removed and ``path`` stays as it was.

    Args:
        path: the file to write; missing parent folders are made.
        private: whether only the owner may read the file, at every moment; otherwise it gets the process's usual mode.

    Yields:
        The temporary path, an empty file with the suffix of ``path``; write the content there.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".partial{path.suffix}")
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            # mkstemp and safetensors create private files; results are shared
            partial.chmod(0o600 if private else 0o666 & ~_umask())
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def private_folder(path: Path) -> None:
    """Makes a folder that only its owner can enter, and takes an existing one's rights from all others.

    Args:
        path: the folder; missing parents are made with the usual rights.

    Raises:
        MagicDriveError: the folder cannot be made, or it belongs to another user.
    """
    with _explained(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.getuid():
            raise MagicDriveError(f"{path} belongs to another user (uid {found.st_uid})", "use a folder of your own")
        if found.st_mode & 0o077:
            path.chmod(0o700)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``; on a clean exit its files are synced and it replaces ``path``.

    If the block raises, the temporary folder is removed and ``path`` stays as it was.

    Args:
        path: the folder to write; a folder that exists there is replaced as a whole, missing parent folders are made.

    Yields:
        The temporary folder, empty; write the files there.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            _replace_folder(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumable_folder(path: Path | str, key: str) -> Iterator[Path]:
    """Like ``atomic_folder``, for long work: after an interruption, the next call with the same key finds its files.

    Each file in the folder must be written atomically (``atomic_file``). Leftovers of other keys are removed. Only one
    process at a time may use a path.

    Args:
        path: the folder that is replaced on a clean exit.
        key: must change with everything that decides what the files hold.

    Yields:
        The folder to write into.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.{key[:16]}.resumable"
    with _explained(path):
        partial.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{path.name}.*.resumable"):
            if other != partial:
                shutil.rmtree(other)
        for half in partial.rglob(".*.partial*"):  # left by a process that was killed
            half.unlink()
        yield partial
        _replace_folder(partial, path)


def write_unsynced(path: Path | str, data: bytes) -> None:
    """Writes one of thousands of reproducible files: atomically by rename, but without syncing it.

    After a power failure the file may be empty or missing; ``sync_folder`` syncs the names, not the contents.

    Args:
        path: the file to write; missing parent folders are made.
        data: the whole content.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(path: Path | str) -> None:
    """Syncs the names in a folder to disk, once after many ``write_unsynced``.

    Args:
        path: the folder; folders below it are not synced.
    """
    _sync(Path(path))


def check_space(path: Path | str, what: str, needed: float, hint: str) -> None:
    """Checks that the disk has room for a result, before the result is computed.

    Args:
        path: where it will be written; neither the path nor its folder need exist.
        what: what will be written, in words.
        needed: its size in bytes.
        hint: what the user can do if there is no room.

    Raises:
        MagicDriveError: the disk has less room.
    """
    existing = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise MagicDriveError(f"{what} need {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free", hint)


def write_json(path: Path | str, value: Any, *, private: bool = False) -> None:
    """Writes ``value`` as indented JSON, atomically, with sorted keys (so that equal values give equal bytes).

    Args:
        path: the file to write.
        value: what ``json.dumps`` accepts.
        private: whether only the owner may read the file.

    Raises:
        ValueError: ``value`` holds a number that is not finite.
        MagicDriveError: the disk is full or not writable.
    """
    with atomic_file(path, private=private) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path | str, hint: str = "") -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        hint: which command makes the file, for the error.

    Returns:
        The decoded value.

    Raises:
        MagicDriveError: the file is missing, cannot be read, or is not JSON.
    """
    path = Path(path)
    try:
        check_regular(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", hint) from None
    except OSError as error:
        raise MagicDriveError(f"{path} cannot be read: {error.strerror}", hint) from None
    except RecursionError:
        raise MagicDriveError(f"{path} is not valid JSON: nested too deeply", hint) from None
    except ValueError as error:
        raise MagicDriveError(f"{path} is not valid JSON: {error}", hint) from None


def check_regular(path: Path | str) -> None:
    """Checks that opening a file cannot wait for ever, as a pipe or a device would.

    Args:
        path: an existing path; links are followed.

    Raises:
        MagicDriveError: it is neither a file nor a folder.
        OSError: there is nothing, or it cannot be looked at.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise MagicDriveError(f"{path} is not a regular file but a pipe or a device", "put a regular file there")


# What zipfile and NumPy raise for a damaged or hostile zip or npz: damaged LZMA data, an unknown version, encryption, a
# name that is no UTF-8, a header that is no Python literal or asks for more memory than there is.
UNREADABLE_ZIP = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, SyntaxError, MemoryError, AttributeError, TypeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
)

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def file_name(text: str) -> str:
    """Makes a file name of a text that data names: a token, a scene's name.

    Args:
        text: any text, also one with ``/``, ``..`` or NUL.

    Returns:
        The text itself where it is a plain name: at most 100 ASCII letters, digits and ``._+-``, with a letter or digit
        first. Otherwise its plain characters, ``~`` and a digest, so that different texts have different names.
    """
    if _SAFE_NAME.fullmatch(text):
        return text
    plain = re.sub(r"[^A-Za-z0-9_+-]+", "_", text)[:60].strip("_+-")
    return f"{plain or 'name'}~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def sha256_file(path: Path | str) -> str:
    """Computes the SHA-256 of a file's bytes.

    Args:
        path: the file.

    Returns:
        64 hex digits.

    Raises:
        MagicDriveError: the path is a pipe or a device.
        OSError: the file is missing or cannot be read.
    """
    check_regular(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path | str) -> str:
    """Computes the SHA-256 over the names and bytes of all files below a folder, in sorted order.

    Args:
        path: the folder; file names count relative to it, so that a copied folder has the same digest.

    Returns:
        64 hex digits; a folder that is missing has the digest of an empty one.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _replace_folder(partial: Path, path: Path) -> None:
    """Syncs the files of ``partial`` and replaces the folder ``path`` with it."""
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())
        _sync(file)
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        path.replace(old / path.name)
        partial.replace(path)
        shutil.rmtree(old)
    else:
        partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        known = system_error(_error_number(error), path)
        if known is not None:
            raise known from error
        raise


def _error_number(error: OSError | SafetensorError) -> int:
    """Returns the system's error number, 0 for none; safetensors only mentions it in its message."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
