"""64 ranks in stage 3: what each asks of the others fits together, whatever the clips, and is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
VIDEO, IMAGE = ("848x1600", 33), ("224x400", 1)
WORLD = list(range(64))


def played(depth: int, control_depth: int, *ranks: tuple[int, int, tuple[str, int]]) -> list[list[Any]]:
    """Play ranks (rank, ranks that share a clip, size and length of its clip), in a process of its own."""
    roles = [
        {
            "rank": rank,
            "share": share,
            "resolution": resolution,
            "frames": frames,
            "depth": depth,
            "control_depth": control_depth,
        }
        for rank, share, (resolution, frames) in ranks
    ]
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.rehearsal", json.dumps(roles)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def of_group(notes: list[Any], group: list[int]) -> list[Any]:
    """Return what is asked of one group of ranks, in order."""
    return [note for note in notes if note[1] == group]


def assert_fits(share: int, notes: dict[tuple[int, tuple[str, int]], list[Any]]) -> None:
    """Assert that ranks ask the same of all 64 and of the control group, and those that share a clip of each other."""
    first, *others = notes.values()
    for other in others:
        assert of_group(other, WORLD) == of_group(first, WORLD)
        assert [note for note in other if note[0] == "control"] == [note for note in first if note[0] == "control"]
    by_clip: dict[int, list[Any]] = {}
    for (rank, _), asked in notes.items():
        neighbours = list(range(rank // share * share, (rank // share + 1) * share))
        groups = {tuple(note[1]) for note in asked if note[0] != "control"}
        assert groups == {tuple(WORLD), tuple(neighbours)}
        own = of_group(asked, neighbours)
        assert by_clip.setdefault(rank // share, own) == own


def counts(notes: list[Any]) -> Counter[str]:
    """Count what a rank asks: by name, of the ranks that share its clip with " in the group" behind it."""
    return Counter(
        note[1] if note[0] == "control" else note[0] + ("" if note[1] == WORLD else " in the group") for note in notes
    )


def expected_counts(depth: int, control_depth: int, parameters: int, buckets: int) -> dict[str, int]:
    """Return what a step with activation checkpointing asks, its end and the averages for a preview included.

    Each attention that needs all tokens or the context exchanges tokens for heads and back, in the forward pass, in its
    repetition and in the backward pass: three in a spatial block, one in a temporal one, and two and one in control
    blocks. Tokens are gathered once, behind the head.
    """
    attentions = depth * (3 + 1) + control_depth * (2 + 1)
    return {
        "all_to_all_single in the group": 6 * attentions,
        "all_gather_into_tensor in the group": 1,
        "reduce_scatter_tensor in the group": 1,
        "reduce_scatter_base": buckets,
        "allreduce": 1,  # the norm of the gradient
        "allgather_base": 1 + 2 * parameters,  # new weights; averages, and the weights again
        "from_leader": 2,  # the order of gradients, the checkpoint to resume from
        "any_rank": 3,  # a stop before the step, used parameters, a stop after the preview
        "gather": 1,
        "barrier": 1,
    }


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Any]]:
    """Play some ranks of meshes 16 x 4 and 8 x 8, in a network of the XL network's width and one layer of each kind."""
    ranks = {
        "16x4 first": (0, 4, VIDEO),
        "16x4 second": (1, 4, VIDEO),
        "16x4 last": (63, 4, IMAGE),
        "8x8 first": (0, 8, VIDEO),
        "8x8 last": (63, 8, IMAGE),
    }
    return dict(zip(ranks, played(1, 1, *ranks.values()), strict=True))


def test_ranks_with_images_and_with_long_videos_make_the_same_collectives(asked: dict[str, list[Any]]) -> None:
    assert_fits(4, {(0, VIDEO): asked["16x4 first"], (1, VIDEO): asked["16x4 second"], (63, IMAGE): asked["16x4 last"]})
    assert_fits(8, {(0, VIDEO): asked["8x8 first"], (63, IMAGE): asked["8x8 last"]})


def test_the_collectives_of_a_step_are_counted(asked: dict[str, list[Any]]) -> None:
    for notes in asked.values():
        assert counts(notes) == expected_counts(depth=1, control_depth=1, parameters=168, buckets=9)


def test_devices_exchange_gradients_activations_and_weights_only_and_in_bf16(asked: dict[str, list[Any]]) -> None:
    """But for the norm, one number; everything else goes over the control group."""
    for notes in asked.values():
        wide = [note for note in notes if note[0] != "control" and note[2][0][0] != "bfloat16"]
        assert [[name, sizes] for name, _, sizes in wide] == [["allreduce", [["float64", [1]]]]]


@pytest.mark.drill
@pytest.mark.parametrize("share", [4, 8])
def test_the_collectives_of_all_roles_of_the_xl_network_fit(share: int) -> None:
    """Each place in a group, of a group with videos and of one with images."""
    ranks = [(rank, share, VIDEO) for rank in range(share)] + [(63 - rank, share, IMAGE) for rank in range(share)]
    notes = played(28, 13, *ranks)
    assert_fits(share, {(rank, clip): asked for (rank, _, clip), asked in zip(ranks, notes, strict=True)})
    assert counts(notes[0])["all_to_all_single in the group"] == 906
