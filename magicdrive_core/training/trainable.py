"""Which parameters of a network are trained: those that ``training.train_only`` and ``training.freeze`` leave.

A frozen parameter requires no gradient, so it is in no optimizer, in no reduction and in no moving average.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from magicdrive_core.config.schema import Stage, Training
from magicdrive_core.errors import UsageError


def freeze_parameters(network: nn.Module, training: Training, stage: Stage, new: Collection[str] = ()) -> None:
    """Let the parameters that are not trained require no gradient.

    Args:
        network: a stage's network; parameters that require no gradient stay so.
        training: ``train_only``, ``freeze``, ``lora``.
        stage: named in messages.
        new: names of parameters that no other model gave a value. Adapters cannot make up for these: with ``lora``
            they are trained in full, unless ``freeze`` names them.

    Raises:
        UsageError: nothing is left to train.
    """
    chosen = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if training.lora is not None:
        chosen &= {*matching(training.train_only, chosen), *new}
    elif training.train_only:
        chosen &= set(matching(training.train_only, chosen))
    chosen -= set(matching(training.freeze, chosen))
    if not chosen and training.lora is None:
        raise UsageError(
            f"{stage}: training.train_only and training.freeze leave no parameter to train",
            "widen the patterns, or set training.first_stage to a later stage",
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)


def linear_maps(network: nn.Module) -> list[str]:
    """List the names of a network's linear maps.

    Args:
        network: without adapters.
    """
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """List the names that any of the patterns matches.

    Args:
        patterns: with * for any letters, ? for one.
        names: names of parameters or modules.

    Returns:
        The matched names, in their order.
    """
    wanted = list(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def check_patterns(setting: str, patterns: Sequence[str], names: Sequence[str], kind: str) -> None:
    """Refuse patterns that match nothing.

    Args:
        setting: name of the setting that holds the patterns.
        patterns: with * for any letters, ? for one.
        names: all names that they may match.
        kind: what the names are names of, in the plural.

    Raises:
        UsageError: a pattern matches no name; the hint has names near to it.
    """
    for pattern in patterns:
        if not matching([pattern], names):
            raise UsageError(
                f"{setting}: {pattern!r} matches no {kind}", f"near it: {', '.join(_near(pattern, names))}"
            )


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three names, or beginnings of names, that look like a pattern."""
    plain = pattern.strip("*.")
    parts = {".".join(name.split(".")[:length]) for name in names for length in range(1, name.count(".") + 2)}
    containing = sorted((part for part in parts if plain in part), key=len)[:3]
    return containing or difflib.get_close_matches(plain, sorted(parts), n=3, cutoff=0.3) or sorted(names)[:3]
