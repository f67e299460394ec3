"""The command line: one verb for each piece of work. DVC stages and Prefect tasks run the same verbs.

Everything heavy is imported inside its verb, so that ``magicdrive --help`` answers at once.
Exit codes: 1 the work failed, 2 wrong command line or params.yaml, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from magicdrive_core.cli import (
    bundle_commands,
    config_commands,
    data_commands,
    generation_commands,
    model_commands,
    submission_commands,
    training_commands,
    video_commands,
)
from magicdrive_core.errors import ERROR_NOTE, MagicDriveError, report_error
from magicdrive_core.utils.offline import disable_telemetry

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for group in (
    config_commands,
    data_commands,
    training_commands,
    generation_commands,
    submission_commands,
    model_commands,
):
    app.add_typer(group.app)
app.add_typer(video_commands.app, name="video")
app.add_typer(bundle_commands.app, name="bundle")

_debug = False


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """MagicDrive: street-view video diffusion on nuScenes, from the data to a W-CODA submission."""
    global _debug
    _debug = debug


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits. An error that the user can fix is one line and a hint on stderr.

    Args:
        arguments: words after ``magicdrive``; None: those of this process.

    Raises:
        SystemExit: at the end, with one of the exit codes that the module lists.
        MagicDriveError: the verb failed, with ``--debug``.
        OSError: the verb failed, with ``--debug``.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written files are cleaned up
    disable_telemetry()
    try:
        app(arguments)
    except (MagicDriveError, OSError) as error:
        if _debug:
            raise
        sys.exit(_explain(error))
    sys.exit(0)


def _explain(error: MagicDriveError | OSError) -> int:
    """Prints the error, leaves it for the process that started this one, and returns the exit code."""
    reported = report_error(error, "magicdrive --debug shows the traceback")
    if ERROR_NOTE in os.environ:
        from magicdrive_core.utils.files import write_json

        with suppress(MagicDriveError, OSError):  # on a full disk, the lines above must do
            write_json(os.environ[ERROR_NOTE], [reported.message, reported.hint, reported.exit_code])
    return reported.exit_code
