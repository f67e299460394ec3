"""What the verbs share: options, the folders of the DVC stages, and how options are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from magicdrive_core.errors import UsageError

if TYPE_CHECKING:
    from magicdrive_core.config.schema import Config, Stage

INFOS, CONDITIONS, ENCODERS = Path("artifacts/infos"), Path("artifacts/conditions"), Path("artifacts/encoders")
TEXT, LATENTS = Path("artifacts/text"), Path("artifacts/latents")

Params = Annotated[Path, typer.Option("--params", metavar="FILE", help="The file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="KEY=VALUE", help="Override a setting, e.g. -S training.stage1.steps=50."),
]
DEFAULT_PARAMS = Path("params.yaml")


def read_config(params: Path, overrides: list[str] | None) -> Config:
    """Reads the settings of a verb.

    Args:
        params: the file of settings.
        overrides: ``KEY=VALUE`` texts of the option --set; None: none.

    Returns:
        The validated settings.

    Raises:
        UsageError: they are not valid.
    """
    from magicdrive_core.config.load import load_config

    return load_config(params, overrides)


def read_stage(name: str) -> Stage:
    """Checks the name of a training stage.

    Args:
        name: the word on the command line.

    Returns:
        The same name, as one of ``STAGES``.

    Raises:
        UsageError: there is no such stage.
    """
    from magicdrive_core.config.schema import STAGES

    if name not in STAGES:
        raise UsageError(f"there is no stage {name!r}", f"known: {', '.join(STAGES)}")
    return name


def read_shard(text: str) -> tuple[int, int]:
    """Reads the option --shard, which counts workers from 1.

    Args:
        text: ``I/N``, for the I-th of N workers.

    Returns:
        Index of the worker from 0, and number of workers: (I - 1, N).

    Raises:
        UsageError: the text has another form, or I is not within 1 to N.
    """
    share, slash, shares = text.partition("/")
    if not (slash and share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares)):
        raise UsageError(f"--shard {text}: write I/N with 1 <= I <= N", "for example --shard 2/8")
    return int(share) - 1, int(shares)


def read_size(text: str) -> str:
    """Checks the option --size.

    Args:
        text: ``HEIGHTxWIDTH`` in pixels.

    Returns:
        The same text.

    Raises:
        UsageError: it is not HEIGHTxWIDTH in multiples of 8.
    """
    from magicdrive_core.config.schema import parse_size

    try:
        parse_size(text)
    except ValueError as error:
        raise UsageError(f"--size {text}: {error}") from None
    return text


def read_frames(count: int) -> int:
    """Checks the option --frames.

    Args:
        count: number of frames of a clip.

    Returns:
        The same number.

    Raises:
        UsageError: no clip has this number of frames.
    """
    from magicdrive_core.config.schema import check_frames

    try:
        return check_frames(count)
    except ValueError as error:
        raise UsageError(f"--frames {count}: {error}") from None


def write_or_print(text: str, out: Path | None) -> None:
    """Writes a text to a file and prints the file's name; without a file, prints the text.

    Args:
        text: the text, with its last line break.
        out: the file, written atomically; None: print the text.

    Raises:
        MagicDriveError: the disk is full or not writable.
    """
    if out is None:
        print(text, end="")
        return
    from magicdrive_core.utils.files import atomic_file

    with atomic_file(out) as partial:
        partial.write_text(text, encoding="utf-8")
    print(out)
