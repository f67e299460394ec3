"""Items shared among workers: which are finished, who makes the others, and what happens to those that fail.

This module imports no torch; what making an item means is up to its caller.
"""

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

ATTEMPTS = 2  # for an item that fails
PAUSE = 2.0  # seconds between two looks at items that other workers have claimed

Make = Callable[[Item, Claim], "Future[None]"]
"""Starts to make an item; the future ends when its folder is complete. The next item may start before that."""


@dataclass
class Summary:
    """Names of the items of one worker's run.

    Attributes:
        made: items that this worker made.
        skipped: items that were finished before, or by another worker meanwhile.
    """

    made: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def share_items(
    items: Sequence[Item],
    out: Path,
    fingerprint_of: Callable[[Item], str],
    make: Make,
    *,
    shard: tuple[int, int] = (0, 1),
    recoverable: tuple[type[Exception], ...] = (MagicDriveError,),
    wait: Callable[[float], None] = time.sleep,
    advance: Callable[[], None] = lambda: None,
) -> Summary:
    """Makes the items that no other worker makes; returns when all of them are finished.

    A worker starts with the items of its shard and then helps the others. It waits for items that others have claimed,
    and makes them itself if their worker dies. An item that fails is tried again after the others.

    Args:
        items: all items, the same list for every worker.
        out: folder of the items' folders.
        fingerprint_of: returns the fingerprint that an item's folder must have to count as finished.
        make: starts to make an item that this worker has claimed.
        shard: (number of this worker, number of workers).
        recoverable: failures of an item after which the next one can be made.
        wait: sleeps for some seconds.
        advance: called whenever an item needs no more work.

    Returns:
        Names of the items that were made and skipped.

    Raises:
        MagicDriveError: some items failed ``ATTEMPTS`` times; all others are finished.
    """
    share = _Share(out, fingerprint_of, make, recoverable)
    left = _in_turn(items, shard)
    with Claims(out) as claims:
        while left:
            before = len(left)
            left = share.go_through(left, claims, advance)
            if len(left) == before:
                wait(PAUSE)
    if share.failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in sorted(share.failed.items()))
        raise MagicDriveError(
            f"{len(share.failed)} of {len(items)} items failed, each {ATTEMPTS} times. {reasons}",
            "fix this and run again; finished items are skipped",
        )
    return share.summary


class _Share:
    """One worker's work on the items.

    Attributes:
        summary: names of the items made and skipped so far.
        failed: last error of each item that failed ``ATTEMPTS`` times, by name.
    """

    def __init__(
        self,
        out: Path,
        fingerprint_of: Callable[[Item], str],
        make: Make,
        recoverable: tuple[type[Exception], ...],
    ) -> None:
        self._out, self._fingerprint_of, self._make, self._recoverable = out, fingerprint_of, make, recoverable
        self._attempts: Counter[str] = Counter()
        self.summary = Summary()
        self.failed: dict[str, Exception] = {}

    def go_through(self, items: Sequence[Item], claims: Claims, advance: Callable[[], None]) -> list[Item]:
        """Goes through the items once, starts those that nobody makes, and waits for what it started.

        Args:
            items: in the order in which they are tried.
            claims: this worker's.
            advance: called whenever an item needs no more work.

        Returns:
            Items that other workers have claimed or that have to be tried again.
        """
        again: list[Item] = []
        started: deque[tuple[Item, Future[None]]] = deque()

        def settle() -> None:
            item, future = started.popleft()
            if self._is_settled(item, future):
                advance()
            else:
                again.append(item)

        for item in items:
            while started and started[0][1].done():
                settle()
            if self._is_done(item):
                self.summary.skipped.append(item.name)
                advance()
                continue
            claim = claims.take(item.name)
            if claim is None:
                again.append(item)
            elif self._is_done(item):  # finished by another worker between the first look and the claim
                claims.release(item.name)
                self.summary.skipped.append(item.name)
                advance()
            else:
                self._remove_partial(item)
                future = self._start(item, claim)
                future.add_done_callback(partial(_release, claims, item.name))
                started.append((item, future))
        while started:
            settle()
        return again

    def _is_done(self, item: Item) -> bool:
        return is_done(self._out / item.name, self._fingerprint_of(item))

    def _remove_partial(self, item: Item) -> None:
        """Removes the partial folders of workers that were killed while they made this item."""
        for partial_folder in self._out.glob(f".{item.name}.*"):
            shutil.rmtree(partial_folder, ignore_errors=True)

    def _start(self, item: Item, claim: Claim) -> Future[None]:
        """Starts an item; a recoverable failure at the start is one of the future."""
        try:
            return self._make(item, claim)
        except self._recoverable as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def _is_settled(self, item: Item, future: Future[None]) -> bool:
        """Waits for an item; returns whether it was made or failed for the last time."""
        try:
            future.result()
        except self._recoverable as error:
            self._attempts[item.name] += 1
            if self._attempts[item.name] < ATTEMPTS:
                return False
            self.failed[item.name] = error
        else:
            self.summary.made.append(item.name)
        return True


def _release(claims: Claims, name: str, _: Future[None]) -> None:
    claims.release(name)


def _in_turn(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Returns the items of this worker's shard, then those of the other shards, starting with the next one."""
    index, count = shard
    return [item for other in range(count) for item in items[(index + other) % count :: count]]
