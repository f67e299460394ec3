"""Items shared out among workers: which are done, who makes the others, what happens to those that fail. No torch."""

from __future__ import annotations

import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from magicdrive_core.errors import MagicDriveError
from magicdrive_core.inference.claims import Claim, Claims
from magicdrive_core.inference.items import Item, is_done

ATTEMPTS = 2  # of an item that fails
PAUSE = 2.0  # seconds between two looks at items that others have

Make = Callable[[Item, Claim], "Future[None]"]
"""Begins to make an item; the future ends when its folder is in place. The next item may begin before that."""


@dataclass
class Summary:
    """What one worker did with the items, by name."""

    made: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # done before, or by another worker meanwhile


def share_items(
    items: Sequence[Item],
    out: Path,
    wanted: Callable[[Item], str],
    make: Make,
    *,
    shard: tuple[int, int] = (0, 1),
    survives: tuple[type[Exception], ...] = (MagicDriveError,),
    wait: Callable[[float], None] = time.sleep,
    advance: Callable[[], None] = lambda: None,
) -> Summary:
    """Makes the items that no other worker makes; returns when all of them are there.

    A worker begins with its own share and then helps the others. Those that others are at it waits for, and makes them
    itself should their worker die. An item that fails is tried again when the others are through.

    Args:
        items: all items, the same list for every worker.
        out: folder of the items' folders.
        wanted: the fingerprint that makes an item's folder the right one.
        make: makes an item of this worker.
        shard: (number of this worker, number of workers).
        survives: failures of an item after which the next one can be made.
        wait: sleeps.
        advance: called whenever an item is through.

    Raises:
        MagicDriveError: items failed again; all others are there.
    """
    work = _Share(out, wanted, make, survives)
    left = _in_turn(items, shard)
    with Claims(out) as claims:
        while left:
            before = len(left)
            left = work.go_through(left, claims, advance)
            if len(left) == before:
                wait(PAUSE)
    if work.failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in sorted(work.failed.items()))
        raise MagicDriveError(
            f"{len(work.failed)} of {len(items)} items failed, each {ATTEMPTS} times. {reasons}",
            "run again: what is done is kept",
        )
    return work.summary


class _Share:
    """One worker's way through the items."""

    def __init__(
        self, out: Path, wanted: Callable[[Item], str], make: Make, survives: tuple[type[Exception], ...]
    ) -> None:
        self._out, self._wanted, self._make, self._survives = out, wanted, make, survives
        self._attempts: Counter[str] = Counter()
        self.summary = Summary()
        self.failed: dict[str, Exception] = {}

    def go_through(self, items: Sequence[Item], claims: Claims, advance: Callable[[], None]) -> list[Item]:
        """Once through; returns the items that have to be looked at again."""
        again: list[Item] = []
        begun: deque[tuple[Item, Future[None]]] = deque()

        def settle() -> None:
            item, future = begun.popleft()
            if self._ended(item, future):
                advance()
            else:
                again.append(item)

        for item in items:
            while begun and begun[0][1].done():
                settle()
            if self._is_done(item):
                self.summary.skipped.append(item.name)
                advance()
                continue
            claim = claims.take(item.name)
            if claim is None:
                again.append(item)
            elif self._is_done(item):  # by another worker since
                claims.give_back(item.name)
                self.summary.skipped.append(item.name)
                advance()
            else:
                self._clear(item)
                future = self._begun(item, claim)
                future.add_done_callback(partial(_give_back, claims, item.name))
                begun.append((item, future))
        while begun:
            settle()
        return again

    def _is_done(self, item: Item) -> bool:
        return is_done(self._out / item.name, self._wanted(item))

    def _clear(self, item: Item) -> None:
        """Removes what workers left behind that were killed at this item."""
        for half in self._out.glob(f".{item.name}.*"):
            shutil.rmtree(half, ignore_errors=True)

    def _begun(self, item: Item, claim: Claim) -> Future[None]:
        try:
            return self._make(item, claim)
        except self._survives as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def _ended(self, item: Item, future: Future[None]) -> bool:
        """Waits for an item; whether nothing more is to be done about it."""
        try:
            future.result()
        except self._survives as error:
            self._attempts[item.name] += 1
            if self._attempts[item.name] < ATTEMPTS:
                return False
            self.failed[item.name] = error
        else:
            self.summary.made.append(item.name)
        return True


def _give_back(claims: Claims, name: str, _: Future[None]) -> None:
    claims.give_back(name)


def _in_turn(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """This worker's own items, then those of the others, beginning with its neighbour's."""
    index, count = shard
    return [item for other in range(count) for item in items[(index + other) % count :: count]]
