"""At most one worker has an item, among processes and hosts that live, die, or only seem to be dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from magicdrive_core.inference.claims import EXPIRY, FOLDER, Claims

HOLDER = """
import sys, time
from pathlib import Path
from magicdrive_core.inference.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    print(claims.take("item") is not None, flush=True)
    time.sleep(300)
"""
ELSEWHERE = json.dumps({"host": "far", "pid_namespace": "another machine", "pid": 1, "started": 0.0})


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    with Claims(tmp_path) as made:
        yield made


def test_one_of_two_workers_has_an_item_until_it_releases_it(claims: Claims, tmp_path: Path) -> None:
    with Claims(tmp_path) as other:
        mine = claims.take("item")
        assert mine is not None
        assert mine.is_held
        assert other.take("item") is None
        assert other.take("another") is not None
        claims.release("item")
        assert other.take("item") is not None
    assert claims.take("another") is not None  # leaving the context releases


def test_the_claim_of_a_killed_process_is_free_at_once(claims: Claims, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert claims.take("item") is None
        holder.kill()
    assert claims.take("item") is not None


@pytest.mark.parametrize("text", [ELSEWHERE, ""])
def test_a_claim_of_another_host_is_free_when_it_was_not_touched_for_long(
    claims: Claims, tmp_path: Path, text: str
) -> None:
    path = tmp_path / FOLDER / "item.0"
    path.write_text(text)
    assert claims.take("item") is None
    os.utime(path, (time.time() - EXPIRY - 60,) * 2)
    assert claims.take("item") is not None


def test_only_one_takes_over_and_the_owner_taken_for_dead_can_notice(claims: Claims, tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path, expiry=-60) as impatient:  # takes every owner for dead
        mine = first.take("item")
        assert mine is not None
        assert impatient.take("item") is not None
        assert not mine.is_held
        assert claims.take("item") is None
        first.release("item")
        assert claims.take("item") is None  # it no longer belongs to the first one


def test_owners_touch_their_claims(tmp_path: Path) -> None:
    with Claims(tmp_path, heartbeat=0.01) as claims:
        claim = claims.take("item")
        assert claim is not None
        os.utime(claim.path, (1.0, 1.0))
        deadline = time.monotonic() + 60
        while claim.path.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
