"""Wrappers around the calls of a network's modules: how techniques are applied from outside, and taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from magicdrive_core.model.transformer import MagicDrive

Call = Callable[..., Any]


def wrap(module: nn.Module, name: str, wrapper: Callable[[Call], Call]) -> None:
    """Replaces ``module.name`` by ``wrapper`` of it, on this module alone.

    Args:
        module: a module of a network.
        name: name of a method, or of a function that is an attribute of the class.
        wrapper: builds the new function from the present one.
    """
    setattr(module, name, wrapper(getattr(module, name)))


def unwrap(network: MagicDrive) -> None:
    """Takes off all that was applied: what the classes of the modules define shows again.

    Args:
        network: the network; every wrapped function and its token shard are removed from its modules.
    """
    for module in network.modules():
        for name in ("forward", "add_skip", "inner", "own_heads", "tokens"):
            vars(module).pop(name, None)
