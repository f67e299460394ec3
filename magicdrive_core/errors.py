"""Errors for users: one line says what is wrong and where, one line says what to do."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

# Environment variable: the file in which a child leaves its error for the process that started it, through any
# processes in between (`dvc repro`, a shell).
ERROR_NOTE = "MAGICDRIVE_ERROR_NOTE"

_LOGIN = re.compile(r"(?<=://)[^:/@\s]*(?::[^\s'\"]*)?@")  # user:password@ of an address, to the last @ of the word
_QUERY = re.compile(r"(?<=[?&])([^=&\s]*(?:pass|secret|token|key)[^=&\s]*=)[^&\s'\"]*", re.IGNORECASE)
HIDDEN = "***"


def redact(text: str) -> str:
    """Hides what logs in: user and password of addresses, and values of their query that are named like secrets.

    Args:
        text: any text, such as ``postgresql://user:password@host/db?sslpassword=x`` in a sentence.

    Returns:
        The text with ``***`` in place of secrets.
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))


class MagicDriveError(Exception):
    """Reports a fault outside the program: data, disk, a port, a file. The command line exits with 1.

    Args:
        message: what is wrong and where, in one line; passwords of addresses in it are hidden.
        hint: what the user can do, in one line; likewise.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = redact(message)
        self.hint = redact(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MagicDriveError):
    """Reports a command line or params.yaml that asks for something impossible. The command line exits with 2."""

    exit_code = 2


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EROFS, errno.EPERM}


def system_error(number: int, path: Path | str) -> MagicDriveError | None:
    """Explains an error of the operating system to a user who writes to ``path``.

    Args:
        number: the error number (``errno``).
        path: what was being written.

    Returns:
        The error to raise; None for a number without an explanation.
    """
    if number in _FULL:
        return MagicDriveError(
            f"no space left on the disk of {path}: {os.strerror(number)}", "free some space and run again"
        )
    if number in _FORBIDDEN:
        return MagicDriveError(f"{path} cannot be written: {os.strerror(number)}", "check the folder's permissions")
    return None


def report_error(error: MagicDriveError | OSError, hint: str) -> MagicDriveError:
    """Prints an error and its hint to stderr, one line each.

    Args:
        error: what stopped the work.
        hint: what to do about a system error without an explanation.

    Returns:
        The error that was printed.
    """
    if not isinstance(error, MagicDriveError):
        known = system_error(error.errno or 0, error.filename or Path.cwd())
        error = known or MagicDriveError(str(error) or type(error).__name__, hint)
    print(f"error: {error.message}" + (f"\n hint: {error.hint}" if error.hint else ""), file=sys.stderr)
    return error
