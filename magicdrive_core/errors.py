"""The errors that a user sees: one line with what is wrong and where, one with what to do."""

from __future__ import annotations

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
