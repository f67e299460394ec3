"""The errors that a user sees: one line with what is wrong and where, one with what to do."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

# Environment variable: the file in which a child leaves its error for the process that started it, however many
# others (`dvc repro`, a shell) stand between them.
ERROR_NOTE = "MAGICDRIVE_ERROR_NOTE"


class MagicDriveError(Exception):
    """Something outside the program is wrong: data, disk, a port, a file. The command line exits with 1.

    Args:
        message: what is wrong and where it came from, in one line.
        hint: what the user can do about it, in one line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MagicDriveError):
    """The command line or params.yaml asks for something impossible. The command line exits with 2."""

    exit_code = 2


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EROFS, errno.EPERM}


def system_error(number: int, path: Path | str) -> MagicDriveError | None:
    """What a system's error number means for a user who writes to ``path``; None: nothing that is known here."""
    if number in _FULL:
        return MagicDriveError(
            f"no space left on the disk of {path}: {os.strerror(number)}", "free some space and run again"
        )
    if number in _FORBIDDEN:
        return MagicDriveError(f"{path} cannot be written: {os.strerror(number)}", "check the folder's rights")
    return None


def report_error(error: MagicDriveError | OSError, hint: str) -> MagicDriveError:
    """Prints what is wrong and what to do, a line each, to stderr; returns that.

    Args:
        error: what ended the work.
        hint: for an error of the system that says nothing about the way out.
    """
    if not isinstance(error, MagicDriveError):
        known = system_error(error.errno or 0, error.filename or Path.cwd())
        error = known or MagicDriveError(str(error) or type(error).__name__, hint)
    print(f"error: {error.message}" + (f"\n hint: {error.hint}" if error.hint else ""), file=sys.stderr)
    return error
