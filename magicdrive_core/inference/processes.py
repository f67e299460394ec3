"""The processes that sample an item: a single one, or a process group whose leader announces items to followers."""

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

_ALIVE = "alive"  # sent while there is no item, so that the followers' collectives do not time out


class SingleProcess:
    """One process that samples alone, and the interface of ``ProcessGroup``.

    Attributes:
        sequence_group: ranks that share the tokens of every frame; None: this process has all of them.
        guidance_group: two ranks, one for each pass of guidance; None: this process makes both.
        recoverable: failures of an item after which the next one can be sampled.
    """

    sequence_group: RankGroup | None = None
    guidance_group: RankGroup | None = None
    recoverable: tuple[type[Exception], ...] = (MagicDriveError, torch.OutOfMemoryError)

    def announce(self, item: Item) -> None:
        """Announces the item that is sampled next to the followers; without followers it does nothing.

        Args:
            item: which every process samples next.
        """

    def from_leader(self, make: Callable[[], Tensor]) -> Tensor:
        """Calls a function on the leader only and hands its result to every process; all of them call this.

        Args:
            make: returns a tensor on the CPU.

        Returns:
            The tensor, the same on every process.
        """
        return make()

    def wait(self, seconds: float) -> None:
        """Sleeps while there is no item to announce; called by the leader.

        Args:
            seconds: how long.
        """
        time.sleep(seconds)


class ProcessGroup(SingleProcess):
    """All processes of the default process group; rank 0 leads, the others follow.

    With ``split_guidance`` the first half of the ranks makes guidance's conditional pass, the second half the
    unconditional one.

    Args:
        status: file that is touched with every item, the sign of life that the launcher watches.
        split_guidance: whether the two passes of guidance are made by different ranks.
    """

    # Not out of memory: in the middle of sampling the other ranks wait for this one, so that all of them have to end.
    recoverable = (MagicDriveError,)

    def __init__(self, status: Path, *, split_guidance: bool = False) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        sharing = world // 2 if split_guidance else world
        same_pass = [range(first, first + sharing) for first in range(0, world, sharing)]
        partners = [range(first, world, sharing) for first in range(sharing)] if split_guidance else []
        for ranks in [*same_pass, *partners]:  # every process creates every group, in the same order
            group = dist.new_group(list(ranks))
            if rank in ranks and len(ranks) > 1:
                if ranks in partners:
                    self.guidance_group = RankGroup(group)
                else:
                    self.sequence_group = RankGroup(group)
        self._status = status

    def announce(self, item: Item | None) -> None:
        """Announces the next item to the followers; called by the leader.

        Args:
            item: which all ranks sample next; None: there are no more, and the followers return.
        """
        self._broadcast(item)

    def from_leader(self, make: Callable[[], Tensor]) -> Tensor:
        """Calls a function on rank 0 and broadcasts its result. Collective.

        Args:
            make: returns a tensor on the CPU; not called on other ranks.

        Returns:
            The tensor, the same on every rank.
        """
        shared = [make() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        assert shared[0] is not None
        return shared[0]

    def wait(self, seconds: float) -> None:
        """Sleeps, then tells the followers and the launcher that the leader is alive.

        Args:
            seconds: how long; less than the timeout of the followers' collectives.
        """
        super().wait(seconds)
        self._broadcast(_ALIVE)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tells the followers at the end of the context that there are no more items.

        A recoverable error counts as such an end. After any other error the launcher ends the whole group.
        """
        try:
            yield
        except self.recoverable:
            self.announce(None)
            raise
        self.announce(None)

    def announced_items(self) -> Iterator[Item]:
        """Yields the items on a follower as the leader announces them, until there are no more.

        Yields:
            The next item; the iterator waits for the leader's announcement.
        """
        while True:
            received: list[Item | str | None] = [None]
            dist.broadcast_object_list(received, src=0)
            if received[0] is None:
                return
            if isinstance(received[0], Item):
                yield received[0]

    def _broadcast(self, message: Item | str | None) -> None:
        self._status.touch()
        dist.broadcast_object_list([message], src=0)
