"""The processes that sample an item together: one of them alone, or a leader that names items and others that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.items import Item
from magicdrive_core.model.parallel import DeviceGroup, OneDevice


class Alone:
    """One process.

    Attributes:
        devices: that share the network's work.
        survives: failures of an item after which the next one can be made.
    """

    devices = OneDevice()
    survives: tuple[type[Exception], ...] = (MagicDriveError, torch.OutOfMemoryError)

    def name(self, item: Item) -> None:
        """Says which item is sampled next, to those who help."""


class Team(Alone):
    """All processes of this process group; rank 0 leads.

    Args:
        status: a file that is touched with every item: sign of life for the launcher.
    """

    # Out of memory in the middle of sampling, the others wait for this process: all of them have to end.
    survives = (MagicDriveError,)

    def __init__(self, status: Path) -> None:
        assert dist.group.WORLD is not None
        self.devices = DeviceGroup(dist.group.WORLD)
        self._status = status

    def name(self, item: Item | None) -> None:
        """Of the leader; None: there are no more."""
        self._status.touch()
        dist.broadcast_object_list([item], src=0)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Of the leader: afterwards there are no more items."""
        try:
            yield
        except self.survives:
            self.name(None)
            raise
        self.name(None)

    def named(self) -> Iterator[Item]:
        """Of the others: the items as they are named."""
        while True:
            heard: list[Item | None] = [None]
            dist.broadcast_object_list(heard, src=0)
            if heard[0] is None:
                return
            yield heard[0]
