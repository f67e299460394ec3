"""The processes that sample an item together: one of them alone, or a leader that names items and others that help."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.items import Item
from magicdrive_core.parallel.sequence_parallel import RankGroup

_WAIT = "wait"  # said from time to time, so that nobody takes the leader for dead


class SingleProcess:
    """One process.

    Attributes:
        sequence_group: ranks that share the tokens of every frame; None: this one has all.
        guidance_group: two ranks, each of which makes one of guidance's passes; None: this one makes both.
        survives: failures of an item after which the next one can be made.
    """

    sequence_group: RankGroup | None = None
    guidance_group: RankGroup | None = None
    survives: tuple[type[Exception], ...] = (MagicDriveError, torch.OutOfMemoryError)

    def name(self, item: Item) -> None:
        """Says which item is sampled next, to those who help."""

    def made_once(self, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` of the leader returns, on the CPU of all of them."""
        return make()

    def wait(self, seconds: float) -> None:
        """Of the leader, who has nothing to name for now."""
        time.sleep(seconds)


class ProcessGroup(SingleProcess):
    """All processes of this process group; rank 0 leads.

    With ``split_guidance`` the first half of the ranks makes guidance's conditional pass, the second half the
    unconditional one.

    Args:
        status: a file that is touched with every item: sign of life for the launcher.
    """

    # Out of memory in the middle of sampling, the others wait for this process: all of them have to end.
    survives = (MagicDriveError,)

    def __init__(self, status: Path, *, split_guidance: bool = False) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        sharing = world // 2 if split_guidance else world
        same_pass = [range(first, first + sharing) for first in range(0, world, sharing)]
        partners = [range(first, world, sharing) for first in range(sharing)] if split_guidance else []
        for ranks in [*same_pass, *partners]:  # every process makes every group, in one order
            group = dist.new_group(list(ranks))
            if rank in ranks and len(ranks) > 1:
                if ranks in partners:
                    self.guidance_group = RankGroup(group)
                else:
                    self.sequence_group = RankGroup(group)
        self._status = status

    def name(self, item: Item | None) -> None:
        """Of the leader; None: there are no more."""
        self._say(item)

    def made_once(self, make: Callable[[], Tensor]) -> Tensor:
        told = [make() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(told, src=0)
        assert told[0] is not None
        return told[0]

    def wait(self, seconds: float) -> None:
        super().wait(seconds)
        self._say(_WAIT)

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
            heard: list[Item | str | None] = [None]
            dist.broadcast_object_list(heard, src=0)
            if heard[0] is None:
                return
            if isinstance(heard[0], Item):
                yield heard[0]

    def _say(self, word: Item | str | None) -> None:
        self._status.touch()
        dist.broadcast_object_list([word], src=0)
